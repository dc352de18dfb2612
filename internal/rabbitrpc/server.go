package rabbitrpc

import (
	"cmp"
	"context"
	"log/slog"
	"time"

	"connectrpc.com/connect/v2"
	"github.com/cenkalti/backoff/v5"
	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/metric"
	"go.opentelemetry.io/otel/trace"
)

// ServerConfig sets up a Server.
type ServerConfig struct {
	URL string
	// Exchange is where requests come from. Default DefaultExchange.
	Exchange string
	// Name is the connection name that the broker shows.
	Name string
	// Prefetch is the largest number of calls of one service that are executed at once. Further calls wait in the queue,
	// or for another replica. Default 64.
	Prefetch int
	// MaxBytes bounds the requests that were received and not yet handled. Beyond it nothing more is read. Default 32 MiB.
	// One more request may arrive, in the worst case of the broker's max_message_size.
	MaxBytes int64
	// RequestMaxBytes and ReplyMaxBytes bound the messages. Larger ones are answered with resource_exhausted. Default 4
	// MiB each.
	RequestMaxBytes, ReplyMaxBytes int
	// DrainTimeout bounds how long Run waits for the calls in flight after its context is done. Default 20 s.
	DrainTimeout time.Duration
	// Log receives connection failures, dropped requests and panics. Default slog.Default().
	Log *slog.Logger
	// MeterProvider and TracerProvider take the measurements. Default: OpenTelemetry's global ones.
	MeterProvider  metric.MeterProvider
	TracerProvider trace.TracerProvider
}

// Server is a replica of the services of a connect.Server.
type Server struct {
	config   ServerConfig
	rpc      *connect.Server
	services map[string]*service
	meters   meters
	tracer   trace.Tracer
}

// service is one service and its queue.
type service struct {
	name    string
	methods map[string]connect.Spec // by procedure
	slots   chan struct{}           // one for each call in flight, over all connections
}

// NewServer makes a Server for the methods that are registered with rpc now. It does not connect.
func NewServer(config ServerConfig, rpc *connect.Server) *Server {
	config.Exchange = cmp.Or(config.Exchange, DefaultExchange)
	config.Prefetch = cmp.Or(config.Prefetch, 64)
	config.MaxBytes = cmp.Or(config.MaxBytes, 32<<20)
	config.RequestMaxBytes = cmp.Or(config.RequestMaxBytes, 4<<20)
	config.ReplyMaxBytes = cmp.Or(config.ReplyMaxBytes, 4<<20)
	config.DrainTimeout = cmp.Or(config.DrainTimeout, 20*time.Second)
	config.Log = cmp.Or(config.Log, slog.Default())
	if config.MeterProvider == nil {
		config.MeterProvider = otel.GetMeterProvider()
	}
	if config.TracerProvider == nil {
		config.TracerProvider = otel.GetTracerProvider()
	}
	services := map[string]*service{}
	for spec := range rpc.Specs() {
		name := ServiceOf(spec.Procedure)
		if services[name] == nil {
			slots := make(chan struct{}, config.Prefetch)
			services[name] = &service{name: name, methods: map[string]connect.Spec{}, slots: slots}
		}
		services[name].methods[spec.Procedure] = spec
	}
	return &Server{
		config: config, rpc: rpc, services: services,
		meters: newMeters(config.MeterProvider, "server"), tracer: config.TracerProvider.Tracer(scope),
	}
}

// Run serves until ctx is done, then finishes and answers the calls that it has begun. It reconnects after every
// failure. It returns an error if the drain failed: the drain timeout aborted calls, or the connection was lost.
func (s *Server) Run(ctx context.Context) error {
	pause := backoff.NewExponentialBackOff()
	pause.InitialInterval = 50 * time.Millisecond
	pause.MaxInterval = 2 * time.Second // short, because no caller is served meanwhile
	for {
		began := time.Now()
		err := s.session(ctx)
		if ctx.Err() != nil {
			return err
		}
		if time.Since(began) > pause.MaxInterval {
			pause.Reset()
		}
		retryIn := pause.NextBackOff()
		s.config.Log.WarnContext(ctx, "rpc server interrupted", "error", err, "retry_in", retryIn)
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(retryIn):
		}
	}
}
