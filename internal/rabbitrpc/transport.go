package rabbitrpc

import (
	"cmp"
	"context"
	"sync"
	"time"

	"connectrpc.com/connect/v2"
	"example.com/shop/internal/rabbit"
	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/metric"
	"go.opentelemetry.io/otel/trace"
)

// TransportConfig sets up a Transport.
type TransportConfig struct {
	URL string
	// Exchange is where requests go. Default DefaultExchange.
	Exchange string
	// Name is the connection's name in the broker's eyes.
	Name string
	// Timeout is the deadline of calls without one. Default 30 s. They need one: a lost answer is noticed by nothing else.
	Timeout time.Duration
	// MaxInFlight bounds the calls under way; one more is resource_exhausted. Default 10,000.
	MaxInFlight int
	// RequestMaxBytes and ReplyMaxBytes bound the messages; what is larger is resource_exhausted. Default 4 MiB each. More than the broker
	// takes (128 MiB, from version 4 on 16 MiB) ends the connection.
	RequestMaxBytes, ReplyMaxBytes int
	// MeterProvider and TracerProvider take the measurements. Default: OpenTelemetry's global ones.
	MeterProvider  metric.MeterProvider
	TracerProvider trace.TracerProvider
}

// Transport is a connect.Transport over one connection to RabbitMQ, made at the first call and again after it was lost. Any number of
// calls may be under way on it.
//
//	client := ordersv1connect.NewOrderServiceClient(connect.NewClient(transport))
//
// When the connection is lost, all calls under way end with unavailable, and with a text that says whether their requests had been sent.
// It refuses streams with unimplemented.
type Transport struct {
	config TransportConfig
	meters meters
	tracer trace.Tracer
	// life ends with Close. It is the context of what no single call should end, which is dialling.
	life context.Context
	end  context.CancelFunc

	mu       sync.Mutex
	link     *link          // the newest one
	dialling chan struct{}  // closed when the attempt under way is over; nil if there is none
	failure  *connect.Error // of the last attempt
	failedAt time.Time
	running  sync.WaitGroup
}

// redialAfter is how long calls are refused at once after an attempt to connect has failed: long enough to spare a broker that is
// coming up, short enough that nobody notices.
const redialAfter = 200 * time.Millisecond

var errClosed = connect.NewError(connect.CodeUnavailable, "the client is closed")

// NewTransport makes a Transport. It does not connect.
func NewTransport(config TransportConfig) *Transport {
	config.Exchange = cmp.Or(config.Exchange, DefaultExchange)
	config.Timeout = cmp.Or(config.Timeout, 30*time.Second)
	config.MaxInFlight = cmp.Or(config.MaxInFlight, 10_000)
	config.RequestMaxBytes = cmp.Or(config.RequestMaxBytes, 4<<20)
	config.ReplyMaxBytes = cmp.Or(config.ReplyMaxBytes, 4<<20)
	if config.MeterProvider == nil {
		config.MeterProvider = otel.GetMeterProvider()
	}
	if config.TracerProvider == nil {
		config.TracerProvider = otel.GetTracerProvider()
	}
	t := &Transport{config: config, meters: newMeters(config.MeterProvider, "client"), tracer: config.TracerProvider.Tracer(scope)}
	t.life, t.end = context.WithCancel(context.Background())
	return t
}

// NewClientStream implements connect.Transport.
func (t *Transport) NewClientStream(ctx context.Context, spec connect.Spec) (connect.ClientStream, error) {
	if spec.StreamType != connect.StreamTypeUnary {
		return nil, connect.NewError(connect.CodeUnimplemented, "streams are not served over RabbitMQ")
	}
	return t.newStream(ctx, spec), nil
}

// Close ends the connection and with it all calls under way.
func (t *Transport) Close() error {
	t.end()
	t.mu.Lock()
	link := t.link
	t.mu.Unlock()
	if link != nil {
		link.lose(errClosed)
	}
	t.running.Wait()
	return nil
}

// connected returns a link, and waits for one if need be: for one attempt at most.
func (t *Transport) connected(ctx context.Context) (*link, error) {
	for {
		link, attempt, err := t.current()
		if link != nil || err != nil {
			return link, err
		}
		select {
		case <-attempt:
		case <-ctx.Done():
			return nil, fromContext(ctx)
		}
	}
}

// current returns the link, or why there is none, or the attempt to make one, which it begins if need be.
func (t *Transport) current() (*link, <-chan struct{}, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	switch {
	case t.life.Err() != nil:
		return nil, nil, errClosed
	case t.link != nil && !t.link.isLost():
		return t.link, nil, nil
	case t.dialling == nil && t.failure != nil && time.Since(t.failedAt) < redialAfter:
		return nil, nil, t.failure
	case t.dialling == nil:
		t.dialling = make(chan struct{})
		t.running.Go(t.dial)
	}
	return nil, t.dialling, nil
}

// dial makes one attempt to connect.
func (t *Transport) dial() {
	link, err := t.connect()
	t.mu.Lock()
	defer t.mu.Unlock()
	t.link, t.failure = link, nil
	if err != nil {
		t.failure, t.failedAt = connect.NewError(connect.CodeUnavailable, "the broker is unavailable, nothing was sent").WithCause(err), time.Now()
	}
	if link != nil && t.life.Err() != nil { // Close was quicker, and did not see it
		link.lose(errClosed)
	}
	close(t.dialling)
	t.dialling = nil
}

func (t *Transport) connect() (*link, error) {
	conn, err := rabbit.Dial(t.life, t.config.URL, t.config.Name)
	if err != nil {
		return nil, err
	}
	stop := context.AfterFunc(t.life, conn.Cut)
	link, err := t.newLink(conn)
	if !stop() {
		err = errClosed
	}
	if err != nil {
		conn.HangUp()
		return nil, err
	}
	t.running.Go(link.write)
	t.running.Go(link.read)
	return link, nil
}
