package app

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"log/slog"
	"math"
	"runtime/debug"
	"slices"
	"time"

	"connectrpc.com/connect/v2"
	"example.com/shop/internal/auth"
	"example.com/shop/internal/idempotency"
	"example.com/shop/internal/rpcserver"
)

// Edge configures who may call, and the limits of calls. The zero value accepts no credentials.
type Edge struct {
	// JWKS is the URL or file of the keys that sign tokens; "" accepts no tokens. Tokens configures which tokens are
	// valid.
	JWKS   string
	Tokens auth.TokenConfig
	// APIKeysFile is a file of lines as auth.Keys documents; APIKeys contains such lines directly.
	APIKeysFile, APIKeys string
	// NoAuth allows every call that uses a local name of this machine, or one of NoAuthHosts.
	NoAuth      bool
	NoAuthHosts []string
	Limit       rpcserver.LimitConfig
	// TLS without a certificate means plain HTTP. Client certificates are credentials.
	TLS rpcserver.TLSFiles
	// InFlightBytes is the memory budget of requests in flight; see rpcserver.Budget. The default is a sixth of the memory
	// limit (GOMEMLIMIT), or 256 MiB without one.
	InFlightBytes int64
	// Origins, ReadMaxBytes, MaxConns and MaxConnsPerAddress are those of rpcserver.Config.
	Origins            []string
	ReadMaxBytes       int
	MaxConns           int
	MaxConnsPerAddress int
}

// edge is an Edge with its files loaded.
type edge struct {
	Edge
	tls  *tls.Config
	keys *auth.KeySet // nil without tokens
	// tokensOnly means that tokens are the only credentials.
	tokensOnly bool
	// budget is shared by all transports of the process.
	budget *rpcserver.Budget
	// interceptors apply to every transport.
	interceptors []connect.ServerInterceptor
}

func newEdge(config Edge) (*edge, error) {
	readMaxBytes := int64(cmp.Or(config.ReadMaxBytes, rpcserver.DefaultReadMaxBytes))
	e := &edge{Edge: config, budget: rpcserver.NewBudget(config.inFlightBytes(), readMaxBytes)}
	config.Limit.Budget = e.budget
	accepts := auth.Config{Off: config.NoAuth, Certificates: config.TLS.ClientCA != ""}
	var err error
	if config.JWKS != "" {
		if e.keys, err = auth.NewKeySet(config.JWKS); err != nil {
			return nil, err
		}
		if accepts.Tokens, err = auth.NewTokens(config.Tokens, e.keys); err != nil {
			return nil, err
		}
	}
	switch {
	case config.APIKeysFile != "" && config.APIKeys != "":
		return nil, errors.New("API keys must come from a file or from a variable, not from both")
	case config.APIKeysFile != "":
		accepts.Keys, err = auth.ReadKeys(config.APIKeysFile)
	case config.APIKeys != "":
		accepts.Keys, err = auth.ParseKeys(config.APIKeys)
	}
	if err != nil {
		return nil, err
	}
	e.tokensOnly = accepts.Tokens != nil && accepts.Keys == nil && !accepts.Certificates
	if config.TLS.Cert != "" {
		if e.tls, err = rpcserver.LoadTLS(config.TLS); err != nil {
			return nil, err
		}
	}
	e.interceptors = []connect.ServerInterceptor{
		auth.Identify(accepts), rpcserver.Limit(config.Limit), auth.Authorize(slog.Default()),
	}
	return e, nil
}

// inFlightBytes returns the memory budget. The rest of a memory limit is for connections, responses and the idle
// process.
func (c Edge) inFlightBytes() int64 {
	const part, unlimited = 6, 256 << 20
	if c.InFlightBytes > 0 {
		return c.InFlightBytes
	}
	if limit := debug.SetMemoryLimit(-1); limit < math.MaxInt64 { // -1 changes nothing
		return limit / part
	}
	return unlimited
}

// newServer makes the API's server.
func (p *process) newServer(services ...func(*connect.Server)) *rpcserver.Server {
	request, response := p.headers()
	return rpcserver.New(rpcserver.Config{
		Addr: p.config.Addr, Checks: p.checks, Interceptors: p.interceptors(),
		MeterProvider: p.telemetry.Meter, TracerProvider: p.telemetry.Tracer,
		TLS: p.edge.tls, Origins: p.edge.Origins, RequestHeaders: request, ResponseHeaders: response,
		ReadMaxBytes: p.edge.ReadMaxBytes, MaxConns: p.edge.MaxConns, MaxConnsPerAddress: p.edge.MaxConnsPerAddress,
		Budget: p.edge.budget, LocalNames: p.edge.NoAuth, Hosts: p.edge.NoAuthHosts,
	}, services...)
}

// startEdge runs the edge's background work.
func (p *process) startEdge(ctx context.Context) {
	p.needKeys()
	if p.edge.keys != nil {
		p.group.Go(func() error { p.edge.keys.Run(ctx); return nil })
	}
	if p.edge.NoAuth {
		p.group.Go(func() error { warnOfNoAuth(ctx, slog.Default()); return nil })
	}
}

// interceptors returns the interceptors of calls over any transport: authentication, limits, authorization, features
// and idempotency keys.
func (p *process) interceptors() []connect.ServerInterceptor {
	all := slices.Clone(p.edge.interceptors)
	for _, f := range p.features {
		if f.interceptor != nil {
			all = append(all, f.interceptor)
		}
	}
	return append(all, p.keys.Interceptor())
}

// headers returns the headers that the interceptors read from requests and write to responses.
func (p *process) headers() (request, response []string) {
	request, response = idempotency.Headers()
	for _, f := range p.features {
		if f.headers != nil {
			read, written := f.headers()
			request, response = append(request, read...), append(response, written...)
		}
	}
	return request, response
}

// callerName returns a unique name of the caller, "" without credentials.
func callerName(ctx context.Context) string {
	caller, known := auth.FromContext(ctx)
	if !known {
		return ""
	}
	return caller.By + ":" + caller.Subject
}

// warnOfNoAuth logs a warning every minute, so that nobody overlooks it.
func warnOfNoAuth(ctx context.Context, log *slog.Logger) {
	for {
		log.WarnContext(ctx, "AUTHENTICATION IS OFF: anybody who reaches this port may call everything. "+
			"Never do this in production.")
		select {
		case <-ctx.Done():
			return
		case <-time.After(time.Minute):
		}
	}
}
