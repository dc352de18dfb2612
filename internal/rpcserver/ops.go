package rpcserver

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"time"
)

// OpsConfig sets up the operators' port.
type OpsConfig struct {
	// Checks check the dependencies of the process. Without checks, the process is ready as soon as it listens.
	Checks []Check
	// Metrics serves GET /metrics. If it is nil, there are no metrics.
	Metrics http.Handler
	// MaxConns bounds the connections. Default 256: kubelets, Prometheus and an operator need a handful.
	MaxConns int
	// Log logs the results of readiness checks and the errors that callers must not see. Default slog.Default().
	Log *slog.Logger
}

// The operators' port has its own small limits. Callers of the API cannot use them up, because they share neither the
// port nor its connections.
const (
	opsMaxConns       = 256
	opsMaxHeaderBytes = 8 << 10
	opsReadTimeout    = 5 * time.Second
	opsWriteTimeout   = 30 * time.Second
	opsIdleTimeout    = 30 * time.Second // probes come every few seconds, scrapes perhaps every minute
)

// Ops is the operators' port: GET /healthz (the process is alive), GET /readyz (it can do its work) and GET /metrics.
// It serves plain HTTP/1.1 without authentication. The network must admit only kubelets, Prometheus and operators.
type Ops struct {
	config  OpsConfig
	handler http.Handler
}

// NewOps makes the operators' port.
func NewOps(config OpsConfig) *Ops {
	config.MaxConns = cmp.Or(config.MaxConns, opsMaxConns)
	config.Log = cmp.Or(config.Log, slog.Default())
	probes := newHealth(config.Checks, config.Log)
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") })
	mux.HandleFunc("GET /readyz", probes.readyz)
	if config.Metrics != nil {
		mux.Handle("GET /metrics", config.Metrics)
	}
	return &Ops{config: config, handler: newEdge(mux, Config{Log: config.Log})}
}

// ServeHTTP serves one request, for tests.
func (o *Ops) ServeHTTP(w http.ResponseWriter, r *http.Request) { o.handler.ServeHTTP(w, r) }

// Serve serves on listener, which it closes, until ended is closed. When ctx is done, the process begins to drain and
// is no longer ready, but Serve still answers probes and scrapes.
func (o *Ops) Serve(ctx context.Context, listener net.Listener, ended <-chan struct{}) error {
	requests := context.WithValue(context.WithoutCancel(ctx), drainingKey{}, ctx)
	server := &http.Server{
		Handler:           o.handler,
		ReadHeaderTimeout: opsReadTimeout,
		ReadTimeout:       opsReadTimeout,
		WriteTimeout:      opsWriteTimeout,
		IdleTimeout:       opsIdleTimeout,
		MaxHeaderBytes:    opsMaxHeaderBytes,
		BaseContext:       func(net.Listener) context.Context { return requests },
		ErrorLog:          slog.NewLogLogger(o.config.Log.Handler(), slog.LevelDebug),
	}
	limits := Config{MaxConns: o.config.MaxConns, WriteTimeout: opsWriteTimeout}.withDefaults()
	listener = limitListener(listener, limits)
	served := make(chan error, 1)
	go func() { served <- server.Serve(listener) }()
	select {
	case err := <-served:
		return fmt.Errorf("serve the operators' port: %w", err)
	case <-ended:
	}
	_ = server.Close() // cuts off running probes, which nobody needs any more
	<-served
	return nil
}
