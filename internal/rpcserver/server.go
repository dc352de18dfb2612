// Package rpcserver is the HTTP edge: Connect, gRPC and gRPC-Web on one port without TLS, with health, readiness and
// reflection.
//
// It guarantees that a request is within its limits of size and time before a handler sees it, and valid by the rules of
// its proto file; that no text of an internal error and no panic reaches a caller; and that a shutdown lets unary
// calls finish. It does not authenticate anyone: pass interceptors for that.
package rpcserver

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"time"

	"connectrpc.com/connect/v2"
	"connectrpc.com/connect/v2/connecthttp"
	"connectrpc.com/grpcreflect/v2"
	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/metric"
	"go.opentelemetry.io/otel/trace"
)

// Config says where and within which limits to serve. The zero value of each field means its default.
type Config struct {
	// Addr is the address that Run listens on. Default ":8080".
	Addr string
	// ReadMaxBytes is the largest request message, before and after decompression. Default 4 MiB, which is gRPC's default;
	// what is larger is resource_exhausted.
	ReadMaxBytes int
	// ReadHeaderTimeout bounds reading the headers of a request. Default 5 s: slower is an attack or a dead peer.
	ReadHeaderTimeout time.Duration
	// BodyTimeout bounds reading the message of a unary or server-streaming call. Default 30 s: 4 MiB at 1 Mbit/s.
	BodyTimeout time.Duration
	// IdleTimeout closes connections on which nothing is under way. Default 2 min, longer than common load balancers keep them.
	IdleTimeout time.Duration
	// MaxConcurrentStreams bounds the calls under way on one HTTP/2 connection. Default 250: a client with more to do
	// waits, and one connection cannot take the whole server.
	MaxConcurrentStreams int
	// DrainTimeout is how long a shutdown waits for calls under way before it cuts them off. Default 20 s, within the 30 s that
	// Kubernetes and Docker Swarm grant by default or can be told to.
	DrainTimeout time.Duration
	// Checks say what the services need. Without any, the server is ready as soon as it listens.
	Checks []Check
	// Interceptors run inside of logging and error mapping, and outside of validation: authentication, say.
	Interceptors []connect.ServerInterceptor
	// Log takes access logs (debug, failures at info) and what callers are not told (warn and error). Default slog.Default().
	Log *slog.Logger
	// MeterProvider and TracerProvider take the duration of calls and their spans. Default: the global ones.
	MeterProvider  metric.MeterProvider
	TracerProvider trace.TracerProvider
}

func (c Config) withDefaults() Config {
	c.Addr = cmp.Or(c.Addr, ":8080")
	c.ReadMaxBytes = cmp.Or(c.ReadMaxBytes, 4<<20)
	c.ReadHeaderTimeout = cmp.Or(c.ReadHeaderTimeout, 5*time.Second)
	c.BodyTimeout = cmp.Or(c.BodyTimeout, 30*time.Second)
	c.IdleTimeout = cmp.Or(c.IdleTimeout, 2*time.Minute)
	c.MaxConcurrentStreams = cmp.Or(c.MaxConcurrentStreams, 250)
	c.DrainTimeout = cmp.Or(c.DrainTimeout, 20*time.Second)
	c.Log = cmp.Or(c.Log, slog.Default())
	if c.MeterProvider == nil {
		c.MeterProvider = otel.GetMeterProvider()
	}
	if c.TracerProvider == nil {
		c.TracerProvider = otel.GetTracerProvider()
	}
	return c
}

// Server serves RPCs over HTTP.
type Server struct {
	config Config
	mux    *http.ServeMux
}

// New makes a server of the services that the register functions register:
//
//	rpcserver.New(config, func(s *connect.Server) { ordersv1connect.RegisterOrderServiceHandler(s, service) })
//
// It adds grpc.health.v1.Health, gRPC reflection, GET /healthz (the process lives) and GET /readyz (it can do its work).
// Reflection shows every proto file that is linked in; put it behind an interceptor if yours are secret.
func New(config Config, register ...func(*connect.Server)) *Server {
	config = config.withDefaults()
	all := append([]connect.ServerInterceptor{Telemetry(config.MeterProvider, config.TracerProvider)}, Interceptors(config.Log, config.Interceptors...)...)
	rpc := connect.NewServer(all...)
	for _, r := range register {
		r(rpc)
	}
	health := newHealth(config, rpc)
	health.register(rpc)
	grpcreflect.Register(rpc)

	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") })
	mux.HandleFunc("GET /readyz", health.readyz)
	connecthttp.Mount(newGuard(mux, config, rpc), rpc, connecthttp.WithReadMaxBytes(config.ReadMaxBytes))
	return &Server{config: config, mux: mux}
}

// Handle adds something that is no RPC, such as the console or /metrics, under a pattern of http.ServeMux. It panics if the
// pattern is taken. Call it before Run.
func (s *Server) Handle(pattern string, handler http.Handler) { s.mux.Handle(pattern, handler) }

// ServeHTTP serves one request: a Server is an http.Handler for tests and for other HTTP servers, which then set the limits
// of connections and drain on their own.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) { s.mux.ServeHTTP(w, r) }

// Run listens on the configured address and serves until ctx is done and the server is drained: see Serve.
func (s *Server) Run(ctx context.Context) error {
	listener, err := new(net.ListenConfig).Listen(ctx, "tcp", s.config.Addr)
	if err != nil {
		return fmt.Errorf("listen: %w", err)
	}
	return s.Serve(ctx, listener)
}

// errDraining is why a stream's context ends when the server shuts down.
var errDraining = errors.New("server is shutting down")

// drainingKey finds, in the context of a request, the context that ends when the server begins to drain.
type drainingKey struct{}

// Serve serves on listener, which it closes, until ctx is done. Then it is no longer ready, takes no new connections, ends
// streams with unavailable and waits for the unary calls under way. It returns nil if they finished within DrainTimeout; those
// that did not have their context cancelled and their connection closed.
func (s *Server) Serve(ctx context.Context, listener net.Listener) error {
	// Requests do not live in ctx, which is done when the drain begins, but in one that is done when it has failed.
	requests, cutOff := context.WithCancel(context.WithoutCancel(ctx))
	defer cutOff()
	server := s.httpServer(context.WithValue(requests, drainingKey{}, ctx))
	served := make(chan error, 1)
	go func() { served <- server.Serve(listener) }()
	select {
	case err := <-served:
		return fmt.Errorf("serve: %w", err)
	case <-ctx.Done():
	}
	drain, cancel := context.WithTimeout(context.WithoutCancel(ctx), s.config.DrainTimeout)
	defer cancel()
	err := server.Shutdown(drain)
	<-served
	if err != nil {
		cutOff()
		_ = server.Close() // closes what Shutdown left; its error is that of a connection nobody waits for
		return fmt.Errorf("drain: %w", err)
	}
	return nil
}

func (s *Server) httpServer(requests context.Context) *http.Server {
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	protocols.SetUnencryptedHTTP2(true) // gRPC without TLS; x/net's h2c handler would never drain
	return &http.Server{
		Handler:           s.mux,
		Protocols:         protocols,
		HTTP2:             &http.HTTP2Config{MaxConcurrentStreams: s.config.MaxConcurrentStreams},
		ReadHeaderTimeout: s.config.ReadHeaderTimeout,
		IdleTimeout:       s.config.IdleTimeout,
		BaseContext:       func(net.Listener) context.Context { return requests },
		ErrorLog:          slog.NewLogLogger(s.config.Log.Handler(), slog.LevelDebug), // broken connections of callers
	}
}
