// Package rpcserver is the HTTP edge. It serves Connect, gRPC and gRPC-Web on one port, with or without TLS, and
// includes gRPC health and reflection. It also serves the operators' port with probes and metrics.
//
// It guarantees three things. Before a handler sees a request, the request is within the limits of size, time and
// number, and valid by the rules of its proto file. No text of an internal error and no panic reaches a caller. A
// shutdown lets unary calls finish. The package does not authenticate callers: pass the interceptors of package auth,
// with Limit between them.
package rpcserver

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"iter"
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

// Config sets the address and the limits of a Server. The zero value of each field means its default.
type Config struct {
	// Addr is the address that Run listens on. Default ":8080".
	Addr string
	// ReadMaxBytes is the largest request message, before and after decompression. Default 4 MiB, which is gRPC's default.
	// A larger message fails with resource_exhausted.
	ReadMaxBytes int
	// ReadHeaderTimeout bounds reading the headers of a request. Default 5 s: a slower peer is an attacker or dead.
	ReadHeaderTimeout time.Duration
	// BodyTimeout bounds reading the message of a unary or server-streaming call. Default 30 s: 4 MiB at 1 Mbit/s.
	BodyTimeout time.Duration
	// IdleTimeout closes idle connections. Default 2 min, longer than common load balancers keep them.
	IdleTimeout time.Duration
	// MaxConcurrentStreams bounds the running calls of one HTTP/2 connection. Default 250. Further calls wait in the
	// client, and one connection cannot take the whole server.
	MaxConcurrentStreams int
	// DrainTimeout is how long a shutdown waits for running calls before it cuts them off. Default 20 s, within the 30 s
	// that Kubernetes and Docker Swarm grant by default or by configuration.
	DrainTimeout time.Duration
	// MaxHeaderBytes bounds the headers of a request, including its URL. Default 64 KiB: a token has at most 8 KiB, and a
	// GET carries its message in the URL.
	MaxHeaderBytes int
	// MaxConns bounds the connections. Default 4096, at worst about 100 MB of buffers. Further connections wait in the
	// kernel's queue.
	MaxConns int
	// MaxConnsPerAddress bounds the connections of one address (for IPv6, one /64). Further connections are closed at
	// once. Default a quarter of MaxConns, so that one address cannot take all, and a proxy in front of all callers
	// still has room. Negative means no limit.
	MaxConnsPerAddress int
	// WriteTimeout bounds the time in which a connection accepts no data. Default 30 s.
	WriteTimeout time.Duration
	// QuietTimeout ends a server stream with unavailable if nothing was sent on it for that long. Default 50 s: common
	// proxies cut off a connection that is silent for 60 s, and then the client gets an error without a reason.
	QuietTimeout time.Duration
	// TLS serves HTTPS: see LoadTLS. Without it, the server serves HTTP.
	TLS *tls.Config
	// Origins are the web origins, such as https://console.example, whose pages may call. Default none.
	Origins []string
	// RequestHeaders and ResponseHeaders are the headers that Interceptors read from requests and write to responses, in
	// addition to those of Headers. A page of another origin can send and read only these.
	RequestHeaders, ResponseHeaders []string
	// LocalNames refuses requests whose host is neither localhost nor a loopback address. With authentication off, it
	// protects against DNS rebinding: if a site makes its name resolve to this machine, a browser treats its pages as
	// of the same origin.
	LocalNames bool
	// Hosts are additional host names that LocalNames accepts, without a port. Strangers must not control their DNS.
	Hosts []string
	// Budget bounds the memory of running requests. Limit must be among the Interceptors, with the same Budget. Default
	// none.
	Budget *Budget
	// Checks check the dependencies of the services. Without checks, the server is ready as soon as it listens.
	Checks []Check
	// Interceptors run inside of logging and error mapping, such as authentication. The messages that they receive
	// are valid.
	Interceptors []connect.ServerInterceptor
	// Log logs calls (at debug, failures at info) and the errors that callers must not see (at warn and error). Default
	// slog.Default().
	Log *slog.Logger
	// MeterProvider and TracerProvider record the durations and the spans of calls. Default: the global ones.
	MeterProvider  metric.MeterProvider
	TracerProvider trace.TracerProvider
}

// DefaultReadMaxBytes is the default of Config.ReadMaxBytes.
const DefaultReadMaxBytes = 4 << 20

// drainTimeout must be shorter than the time that deployments grant. TestDeploymentsGrantTheDrain in
// internal/dev/architecture checks this.
const drainTimeout = 20 * time.Second

func (c Config) withDefaults() Config {
	c.Addr = cmp.Or(c.Addr, ":8080")
	c.ReadMaxBytes = cmp.Or(c.ReadMaxBytes, DefaultReadMaxBytes)
	c.ReadHeaderTimeout = cmp.Or(c.ReadHeaderTimeout, 5*time.Second)
	c.BodyTimeout = cmp.Or(c.BodyTimeout, 30*time.Second)
	c.IdleTimeout = cmp.Or(c.IdleTimeout, 2*time.Minute)
	c.MaxConcurrentStreams = cmp.Or(c.MaxConcurrentStreams, 250)
	c.MaxHeaderBytes = cmp.Or(c.MaxHeaderBytes, 64<<10)
	c.MaxConns = cmp.Or(c.MaxConns, 4096)
	c.MaxConnsPerAddress = cmp.Or(c.MaxConnsPerAddress, max(1, c.MaxConns/4))
	c.WriteTimeout = cmp.Or(c.WriteTimeout, 30*time.Second)
	c.QuietTimeout = cmp.Or(c.QuietTimeout, 50*time.Second)
	c.DrainTimeout = cmp.Or(c.DrainTimeout, drainTimeout)
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
	config  Config
	rpc     *connect.Server
	mux     *http.ServeMux
	handler http.Handler // mux inside of the edge
}

// New makes a server of the services that the register functions register:
//
//	rpcserver.New(config, func(s *connect.Server) { ordersv1connect.RegisterOrderServiceHandler(s, service) })
//
// It adds grpc.health.v1.Health, for load balancers that speak gRPC, and gRPC reflection. Other probes and metrics
// are on the operators' port, whose connections callers cannot use up: see Ops. Reflection shows every proto file
// that is linked in; put it behind an interceptor if yours are secret. Responses of 1 KiB and more are compressed if
// the caller accepts it.
func New(config Config, register ...func(*connect.Server)) *Server {
	config = config.withDefaults()
	outer := []connect.ServerInterceptor{
		Telemetry(config.MeterProvider, config.TracerProvider), endQuiet(config.QuietTimeout),
	}
	rpc := connect.NewServer(append(outer, Interceptors(config.Log, config.Interceptors...)...)...)
	for _, r := range register {
		r(rpc)
	}
	health := newHealth(config.Checks, config.Log)
	health.addServices(rpc)
	health.register(rpc)
	grpcreflect.Register(rpc)

	mux := http.NewServeMux()
	connecthttp.Mount(newGuard(mux, config, rpc), rpc,
		connecthttp.WithCodecs(codecs()...), connecthttp.WithReadMaxBytes(config.ReadMaxBytes),
		connecthttp.WithCompressors(newBoundedGzip(config.ReadMaxBytes, config.Budget)),
		connecthttp.WithCompressMinBytes(compressMinBytes))
	return &Server{config: config, rpc: rpc, mux: mux, handler: newEdge(mux, config)}
}

// Specs yields all procedures of the server.
func (s *Server) Specs() iter.Seq[connect.Spec] { return s.rpc.Specs() }

// Handle adds a handler that is not an RPC under a pattern of http.ServeMux. It panics if the
// pattern is taken. It must be called before Run.
func (s *Server) Handle(pattern string, handler http.Handler) { s.mux.Handle(pattern, handler) }

// ServeHTTP serves one request. It makes Server an http.Handler for tests and for other HTTP servers, which must limit
// connections and drain themselves.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) { s.handler.ServeHTTP(w, r) }

// Listen listens on the configured address, for Serve.
func (s *Server) Listen(ctx context.Context) (net.Listener, error) {
	listener, err := new(net.ListenConfig).Listen(ctx, "tcp", s.config.Addr)
	if err != nil {
		return nil, fmt.Errorf("listen: %w", err)
	}
	return listener, nil
}

// Run listens on the configured address and serves until ctx is done and the server is drained: see Serve.
func (s *Server) Run(ctx context.Context) error {
	listener, err := s.Listen(ctx)
	if err != nil {
		return err
	}
	return s.Serve(ctx, listener)
}

// The server pings silent HTTP/2 connections to check that their peers are alive.
const (
	pingAfter   = 30 * time.Second
	pingTimeout = 15 * time.Second
)

// errDraining is the cause that cancels a stream's context when the server shuts down.
var errDraining = errors.New("server is shutting down")

// drainingKey is the key in a request's context for the context that is done when the server begins to drain.
type drainingKey struct{}

// Serve serves on listener, which it closes, until ctx is done. Then the server is no longer ready and accepts no new
// connections. It ends streams, and requests that have not arrived, with unavailable, and waits for the running unary
// calls. Serve returns nil if they finish within DrainTimeout. Otherwise it cancels their contexts, closes their
// connections and returns an error.
func (s *Server) Serve(ctx context.Context, listener net.Listener) error {
	// The context of requests is not ctx, which is done when the drain begins, but one that is done if the drain fails.
	requests, cutOff := context.WithCancel(context.WithoutCancel(ctx))
	defer cutOff()
	server := s.httpServer(context.WithValue(requests, drainingKey{}, ctx))
	served := make(chan error, 1)
	listener = limitListener(listener, s.config)
	go func() {
		if s.config.TLS != nil {
			served <- server.ServeTLS(listener, "", "") // the config has the certificate
		} else {
			served <- server.Serve(listener)
		}
	}()
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
		_ = server.Close() // closes the remaining connections, whose errors do not matter
		return fmt.Errorf("drain: %w", err)
	}
	return nil
}

func (s *Server) httpServer(requests context.Context) *http.Server {
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	protocols.SetHTTP2(s.config.TLS != nil)
	protocols.SetUnencryptedHTTP2(s.config.TLS == nil) // gRPC without TLS; x/net's h2c handler would never drain
	return &http.Server{
		Handler:   s.handler,
		Protocols: protocols,
		TLSConfig: s.config.TLS,
		HTTP2: &http.HTTP2Config{
			MaxConcurrentStreams: s.config.MaxConcurrentStreams,
			// Pings detect peers that are gone while a stream is silent.
			SendPingTimeout: pingAfter, PingTimeout: pingTimeout,
		},
		MaxHeaderBytes:    s.config.MaxHeaderBytes,
		ReadHeaderTimeout: s.config.ReadHeaderTimeout,
		IdleTimeout:       s.config.IdleTimeout,
		BaseContext:       func(net.Listener) context.Context { return requests },
		ErrorLog:          slog.NewLogLogger(s.config.Log.Handler(), slog.LevelDebug), // callers' broken connections
	}
}
