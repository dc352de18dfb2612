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
	// Checks say what the process needs. Without any, it is ready as soon as it listens.
	Checks []Check
	// Metrics answers GET /metrics; nil serves none.
	Metrics http.Handler
	// MaxConns bounds the connections. Default 256: kubelets, Prometheus and an operator need a handful.
	MaxConns int
	// Log takes what readiness checks find, and what callers are not told. Default slog.Default().
	Log *slog.Logger
}

// The operators' port has small limits of its own. Callers of the API cannot use them up: they share neither the port nor its connections.
const (
	opsMaxConns       = 256
	opsMaxHeaderBytes = 8 << 10
	opsReadTimeout    = 5 * time.Second
	opsWriteTimeout   = 30 * time.Second
	opsIdleTimeout    = 30 * time.Second // a probe comes every few seconds, a scrape perhaps every minute
)

// Ops is the operators' port: GET /healthz (the process lives), GET /readyz (it can do its work) and GET /metrics. It speaks plain
// HTTP/1.1 and asks for no credentials: let the network admit only kubelets, Prometheus and operators.
type Ops struct {
	config  OpsConfig
	handler http.Handler
}

// NewOps makes the operators' port of a process.
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

// ServeHTTP answers one request, for tests.
func (o *Ops) ServeHTTP(w http.ResponseWriter, r *http.Request) { o.handler.ServeHTTP(w, r) }

// Serve serves on listener, which it closes, until ended is closed. From the end of ctx on, which is when the process begins to drain,
// the process is not ready; its probes and metrics are answered all the same.
func (o *Ops) Serve(ctx context.Context, listener net.Listener, ended <-chan struct{}) error {
	requests := context.WithValue(context.WithoutCancel(ctx), drainingKey{}, ctx)
	server := &http.Server{
		Handler:           o.handler,
		ReadHeaderTimeout: opsReadTimeout, ReadTimeout: opsReadTimeout, WriteTimeout: opsWriteTimeout, IdleTimeout: opsIdleTimeout,
		MaxHeaderBytes: opsMaxHeaderBytes,
		BaseContext:    func(net.Listener) context.Context { return requests },
		ErrorLog:       slog.NewLogLogger(o.config.Log.Handler(), slog.LevelDebug),
	}
	listener = limitListener(listener, Config{MaxConns: o.config.MaxConns, WriteTimeout: opsWriteTimeout}.withDefaults())
	served := make(chan error, 1)
	go func() { served <- server.Serve(listener) }()
	select {
	case err := <-served:
		return fmt.Errorf("serve the operators' port: %w", err)
	case <-ended:
	}
	_ = server.Close() // a probe that is cut off comes again, to nobody
	<-served
	return nil
}
