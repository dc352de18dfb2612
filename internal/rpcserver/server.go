// Package rpcserver is the HTTP edge: Connect, gRPC and gRPC-Web on one port, with or without TLS, with gRPC health and reflection; and
// the operators' port, with probes and metrics.
//
// It guarantees that a request is within its limits of size, time and number before a handler sees it, and valid by the rules of
// its proto file; that no text of an internal error and no panic reaches a caller; and that a shutdown lets unary
// calls finish. It does not authenticate anyone: pass the interceptors of package auth for that, and Limit between them.
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
	// MaxHeaderBytes bounds the headers of a request, its URL included. Default 64 KiB: a token has 8 KiB at most, and a GET carries its
	// message in the URL.
	MaxHeaderBytes int
	// MaxConns bounds the connections. Default 4096, some 100 MB of buffers at worst; others wait in the kernel's queue.
	MaxConns int
	// MaxConnsPerAddress bounds the connections of one address, of IPv6 a /64; those beyond it are closed at once. Default a quarter of
	// MaxConns, so that one address cannot take all, and a proxy in front of all callers still has room. Negative is no limit.
	MaxConnsPerAddress int
	// WriteTimeout bounds the time in which a connection takes nothing of what is sent to it. Default 30 s.
	WriteTimeout time.Duration
	// QuietTimeout ends a server's stream on which nothing was sent for so long, with unavailable. Default 50 s: common proxies cut a connection off
	// that is silent for 60 s, and then the client hears an error that says nothing.
	QuietTimeout time.Duration
	// TLS serves HTTPS; see LoadTLS. Without it, HTTP.
	TLS *tls.Config
	// Origins are the web origins, such as https://console.example, whose pages may call. Default none.
	Origins []string
	// RequestHeaders and ResponseHeaders are those that Interceptors read of requests and write to answers, besides what Headers returns. A page of
	// another origin may send and see no others.
	RequestHeaders, ResponseHeaders []string
	// LocalNames refuses requests that do not name this machine as localhost or by a loopback address. With authentication off it keeps out pages of
	// other sites whose name was made to lead here: to a browser they are of the same origin (DNS rebinding).
	LocalNames bool
	// Hosts are further names that LocalNames lets through, without a port. None of them may be one that strangers can make lead here.
	Hosts []string
	// Budget bounds the memory of requests under way, with Limit among the Interceptors, which must have the same one. Default none.
	Budget *Budget
	// Checks say what the services need. Without any, the server is ready as soon as it listens.
	Checks []Check
	// Interceptors run inside of logging and error mapping: authentication, durable calls. What one of them receives is valid.
	Interceptors []connect.ServerInterceptor
	// Log takes access logs (debug, failures at info) and what callers are not told (warn and error). Default slog.Default().
	Log *slog.Logger
	// MeterProvider and TracerProvider take the duration of calls and their spans. Default: the global ones.
	MeterProvider  metric.MeterProvider
	TracerProvider trace.TracerProvider
}

// DefaultReadMaxBytes is the default of Config.ReadMaxBytes.
const DefaultReadMaxBytes = 4 << 20

// drainTimeout must be shorter than the time that deployments grant: TestDeploymentsGrantTheDrain in internal/dev/architecture.
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
	handler http.Handler // mux, and what is around all of it
}

// New makes a server of the services that the register functions register:
//
//	rpcserver.New(config, func(s *connect.Server) { ordersv1connect.RegisterOrderServiceHandler(s, service) })
//
// It adds grpc.health.v1.Health, for load balancers that speak gRPC, and gRPC reflection. Other probes and metrics are on the operators'
// port, which callers cannot use up: see Ops. Reflection shows every proto file that is linked in; put it behind an interceptor if yours are secret. Answers of 1 KiB and more are
// compressed, if the caller takes them so.
func New(config Config, register ...func(*connect.Server)) *Server {
	config = config.withDefaults()
	all := append([]connect.ServerInterceptor{Telemetry(config.MeterProvider, config.TracerProvider), endQuiet(config.QuietTimeout)},
		Interceptors(config.Log, config.Interceptors...)...)
	rpc := connect.NewServer(all...)
	for _, r := range register {
		r(rpc)
	}
	health := newHealth(config.Checks, config.Log)
	health.serves(rpc)
	health.register(rpc)
	grpcreflect.Register(rpc)

	mux := http.NewServeMux()
	connecthttp.Mount(newGuard(mux, config, rpc), rpc,
		connecthttp.WithCodecs(codecs()...), connecthttp.WithReadMaxBytes(config.ReadMaxBytes),
		connecthttp.WithCompressors(newBoundedGzip(config.ReadMaxBytes, config.Budget)), connecthttp.WithCompressMinBytes(compressMinBytes))
	return &Server{config: config, rpc: rpc, mux: mux, handler: newEdge(mux, config)}
}

// Specs yields every procedure that is served.
func (s *Server) Specs() iter.Seq[connect.Spec] { return s.rpc.Specs() }

// Handle adds something that is no RPC, such as the console, under a pattern of http.ServeMux. It panics if the
// pattern is taken. Call it before Run.
func (s *Server) Handle(pattern string, handler http.Handler) { s.mux.Handle(pattern, handler) }

// ServeHTTP serves one request: a Server is an http.Handler for tests and for other HTTP servers, which then set the limits
// of connections and drain on their own.
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

// A silent HTTP/2 connection is asked whether it lives.
const (
	pingAfter   = 30 * time.Second
	pingTimeout = 15 * time.Second
)

// errDraining is why a stream's context ends when the server shuts down.
var errDraining = errors.New("server is shutting down")

// drainingKey finds, in the context of a request, the context that ends when the server begins to drain.
type drainingKey struct{}

// Serve serves on listener, which it closes, until ctx is done. Then it is no longer ready, takes no new connections, ends
// streams and requests that have not arrived with unavailable, and waits for the unary calls under way. It returns nil if they finished within DrainTimeout; those
// that did not have their context cancelled and their connection closed.
func (s *Server) Serve(ctx context.Context, listener net.Listener) error {
	// Requests do not live in ctx, which is done when the drain begins, but in one that is done when it has failed.
	requests, cutOff := context.WithCancel(context.WithoutCancel(ctx))
	defer cutOff()
	server := s.httpServer(context.WithValue(requests, drainingKey{}, ctx))
	served := make(chan error, 1)
	listener = limitListener(listener, s.config)
	go func() {
		if s.config.TLS != nil {
			served <- server.ServeTLS(listener, "", "") // the certificate is in the config
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
		_ = server.Close() // closes what Shutdown left; its error is that of a connection nobody waits for
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
			// Finds peers that are gone while a stream has nothing to say.
			SendPingTimeout: pingAfter, PingTimeout: pingTimeout,
		},
		MaxHeaderBytes:    s.config.MaxHeaderBytes,
		ReadHeaderTimeout: s.config.ReadHeaderTimeout,
		IdleTimeout:       s.config.IdleTimeout,
		BaseContext:       func(net.Listener) context.Context { return requests },
		ErrorLog:          slog.NewLogLogger(s.config.Log.Handler(), slog.LevelDebug), // broken connections of callers
	}
}
