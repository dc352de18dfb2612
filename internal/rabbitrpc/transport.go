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
	// Name is the connection name that the broker shows.
	Name string
	// Timeout applies to calls without a deadline. Default 30 s. Every call needs a deadline: nothing else detects a lost
	// answer.
	Timeout time.Duration
	// MaxInFlight bounds the calls in flight. Further calls fail with resource_exhausted. Default 10,000.
	MaxInFlight int
	// RequestMaxBytes and ReplyMaxBytes bound the messages. Larger ones fail with resource_exhausted. Default 4 MiB
	// each. A message larger than the broker accepts (16 MiB since version 4, 128 MiB before) ends the connection.
	RequestMaxBytes, ReplyMaxBytes int
	// MeterProvider and TracerProvider take the measurements. Default: OpenTelemetry's global ones.
	MeterProvider  metric.MeterProvider
	TracerProvider trace.TracerProvider
}

// Transport is a connect.Transport over one connection to RabbitMQ, which it opens at the first call and again after a
// loss. Many calls may be in flight on it.
//
//	client := ordersv1connect.NewOrderServiceClient(connect.NewClient(transport))
//
// If the connection is lost, all calls in flight end with unavailable and a text that says whether their requests had
// been sent. Transport refuses streams with unimplemented.
type Transport struct {
	config TransportConfig
	meters meters
	tracer trace.Tracer
	// lifetime ends with Close. It is the context for dialing, which no single call should end.
	lifetime context.Context
	cancel   context.CancelFunc

	mu       sync.Mutex
	link     *link          // the newest one
	dialing  chan struct{}  // closed when the current attempt is over; nil if there is none
	failure  *connect.Error // of the last attempt
	failedAt time.Time
	running  sync.WaitGroup
}

// redialAfter is how long calls fail at once after a failed attempt to connect. It is long enough to spare a broker
// that is starting, and short enough to go unnoticed.
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
	t := &Transport{
		config: config, meters: newMeters(config.MeterProvider, "client"), tracer: config.TracerProvider.Tracer(scope),
	}
	t.lifetime, t.cancel = context.WithCancel(context.Background())
	return t
}

// NewClientStream implements connect.Transport.
func (t *Transport) NewClientStream(ctx context.Context, spec connect.Spec) (connect.ClientStream, error) {
	if spec.StreamType != connect.StreamTypeUnary {
		return nil, connect.NewError(connect.CodeUnimplemented, "streams are not supported over RabbitMQ")
	}
	return t.newStream(ctx, spec), nil
}

// Close ends the connection and with it all calls in flight.
func (t *Transport) Close() error {
	t.cancel()
	t.mu.Lock()
	link := t.link
	t.mu.Unlock()
	if link != nil {
		link.lose(errClosed)
	}
	t.running.Wait()
	return nil
}

// connected returns a link. If there is none, it waits for one attempt to connect.
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

// current returns the link, or why there is none, or a channel that is closed after the current attempt to connect. It
// starts an attempt if necessary.
func (t *Transport) current() (*link, <-chan struct{}, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	switch {
	case t.lifetime.Err() != nil:
		return nil, nil, errClosed
	case t.link != nil && !t.link.isLost():
		return t.link, nil, nil
	case t.dialing == nil && t.failure != nil && time.Since(t.failedAt) < redialAfter:
		return nil, nil, t.failure
	case t.dialing == nil:
		t.dialing = make(chan struct{})
		t.running.Go(t.dial)
	}
	return nil, t.dialing, nil
}

// dial makes one attempt to connect.
func (t *Transport) dial() {
	link, err := t.connect()
	t.mu.Lock()
	defer t.mu.Unlock()
	t.link, t.failure = link, nil
	if err != nil {
		const text = "the broker is unavailable; nothing was sent"
		t.failure, t.failedAt = connect.NewError(connect.CodeUnavailable, text).WithCause(err), time.Now()
	}
	if link != nil && t.lifetime.Err() != nil { // Close ran before the link was set
		link.lose(errClosed)
	}
	close(t.dialing)
	t.dialing = nil
}

func (t *Transport) connect() (*link, error) {
	conn, err := rabbit.Dial(t.lifetime, t.config.URL, t.config.Name)
	if err != nil {
		return nil, err
	}
	stop := context.AfterFunc(t.lifetime, conn.Cut)
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
