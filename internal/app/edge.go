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
	"example.com/shop/internal/operations"
	"example.com/shop/internal/rpcserver"
)

// Edge says who may call, and what a call may cost. The zero value lets nobody in.
type Edge struct {
	// JWKS is the URL or file of the keys that tokens are signed with; "" accepts no tokens. Tokens says which ones.
	JWKS   string
	Tokens auth.TokenConfig
	// APIKeysFile is a file of lines that auth.Keys documents, APIKeys are such lines themselves.
	APIKeysFile, APIKeys string
	// NoAuth lets everybody do everything who calls this machine by a local name, or by one of NoAuthHosts.
	NoAuth      bool
	NoAuthHosts []string
	Limit       rpcserver.LimitConfig
	// TLS without a certificate is plain HTTP. Its client certificates count as credentials.
	TLS rpcserver.TLSFiles
	// InFlightBytes is the budget of requests under way; see rpcserver.Budget. Default a sixth of the memory limit (GOMEMLIMIT), or 256 MiB
	// without one.
	InFlightBytes int64
	// Origins, ReadMaxBytes, MaxConns and MaxConnsPerAddress are those of rpcserver.Config.
	Origins            []string
	ReadMaxBytes       int
	MaxConns           int
	MaxConnsPerAddress int
}

// edge is what an Edge opens.
type edge struct {
	Edge
	tls  *tls.Config
	keys *auth.KeySet // nil without tokens
	// tokensOnly: there are no credentials but tokens.
	tokensOnly bool
	// budget is one for the process, whatever its requests come by.
	budget *rpcserver.Budget
	// interceptors are for every transport.
	interceptors []connect.ServerInterceptor
}

func newEdge(config Edge) (*edge, error) {
	e := &edge{Edge: config, budget: rpcserver.NewBudget(config.inFlightBytes(), int64(cmp.Or(config.ReadMaxBytes, rpcserver.DefaultReadMaxBytes)))}
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
		return nil, errors.New("API keys come from a file or from a variable, not from both")
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
	e.interceptors = []connect.ServerInterceptor{auth.Identify(accepts), rpcserver.Limit(config.Limit), auth.Authorize(slog.Default())}
	return e, nil
}

// inFlightBytes is the budget: the rest of a memory limit is for connections, answers, and what the process needs when nobody calls.
func (c Edge) inFlightBytes() int64 {
	const part, unlimited = 6, 256 << 20
	if c.InFlightBytes > 0 {
		return c.InFlightBytes
	}
	if limit := debug.SetMemoryLimit(-1); limit < math.MaxInt64 { // which only asks
		return limit / part
	}
	return unlimited
}

// newServer makes the server of the API.
func (p *process) newServer(services ...func(*connect.Server)) *rpcserver.Server {
	request, response := headers()
	return rpcserver.New(rpcserver.Config{
		Addr: p.config.Addr, Checks: p.checks, Interceptors: p.interceptors(),
		MeterProvider: p.telemetry.Meter, TracerProvider: p.telemetry.Tracer,
		TLS: p.edge.tls, Origins: p.edge.Origins, RequestHeaders: request, ResponseHeaders: response,
		ReadMaxBytes: p.edge.ReadMaxBytes, MaxConns: p.edge.MaxConns, MaxConnsPerAddress: p.edge.MaxConnsPerAddress,
		Budget: p.edge.budget, LocalNames: p.edge.NoAuth, Hosts: p.edge.NoAuthHosts,
	}, services...)
}

// startEdge runs what the edge needs.
func (p *process) startEdge(ctx context.Context) {
	p.needKeys()
	if p.edge.keys != nil {
		p.group.Go(func() error { p.edge.keys.Run(ctx); return nil })
	}
	if p.edge.NoAuth {
		p.group.Go(func() error { warnOfNoAuth(ctx, slog.Default()); return nil })
	}
}

// interceptors are what each call goes through, whatever it came by: who it is, what it may, whether it is to be answered later or was answered before.
func (p *process) interceptors() []connect.ServerInterceptor {
	return append(slices.Clone(p.edge.interceptors), p.calls.Interceptor(), p.keys.Interceptor())
}

// headers are those that the interceptors read of requests and write to answers.
func headers() (request, response []string) {
	for _, of := range []func() (request, response []string){operations.Headers, idempotency.Headers} {
		read, written := of()
		request, response = append(request, read...), append(response, written...)
	}
	return request, response
}

// warnOfNoAuth says every minute what nobody should be able to overlook.
func warnOfNoAuth(ctx context.Context, log *slog.Logger) {
	for {
		log.WarnContext(ctx, "AUTHENTICATION IS OFF: whoever reaches this port may call everything. Never do this in production.")
		select {
		case <-ctx.Done():
			return
		case <-time.After(time.Minute):
		}
	}
}
