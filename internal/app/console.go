package app

import (
	"cmp"
	"context"
	"net/http"
	"strings"

	"connectrpc.com/connect/v2"
	"example.com/shop/internal/console"
	"example.com/shop/internal/gen/ops/v1/opsv1connect"
	"example.com/shop/internal/rabbit"
	"example.com/shop/internal/rpcserver"
)

// Console configures the operators' console.
type Console struct {
	// Addr is where RunAll serves the console; "" for no console.
	Addr string
}

func operatorsConsole(p *process) feature {
	return feature{
		startAll: p.startConsole,
		permissions: func() map[string]rabbit.Permissions {
			return map[string]rabbit.Permissions{"console": p.topology().ObserverPermissions()}
		},
	}
}

// RunConsole serves the operators' console until ctx is done.
func RunConsole(ctx context.Context, config Config) error {
	config.Console.Addr = cmp.Or(config.Console.Addr, config.Addr)
	return run(ctx, config, "console", (*process).startEdge, (*process).startConsole)
}

// startConsole serves the console on its own address, for operators. The console does not need the broker to be ready:
// operators need it most when the broker is down.
func (p *process) startConsole(ctx context.Context) {
	if p.config.Console.Addr == "" {
		return
	}
	gauge := rabbit.NewGauge(p.config.AMQPURL, p.connectionName("console"))
	service := console.New(console.Config{
		DB: p.db, Groups: p.consoleGroups(), Depths: gauge.Read, Dangers: p.dangers,
		APIs: []string{ServiceName + " api", ServiceName + " all"}, Service: ServiceName, Version: p.config.Version,
	})
	server := p.newConsoleServer(service)
	p.group.Go(func() error { defer gauge.Close(); return service.Run(ctx) })
	p.listen(ctx, server)
}

// dangers returns the broker's policies that are dangerous to the queues; none without a management URL.
func (p *process) dangers(ctx context.Context) ([]rabbit.Danger, error) {
	if p.config.ManagementURL == "" {
		return nil, nil
	}
	return p.topology().Policies(ctx, p.config.ManagementURL, p.config.AMQPURL)
}

// newConsoleServer makes the console's server. It accepts the credentials of the API, but refuses pages of other
// origins, even those that the API allows.
func (p *process) newConsoleServer(service *console.Console) *rpcserver.Server {
	server := rpcserver.New(rpcserver.Config{
		Addr: p.config.Console.Addr, Checks: p.consoleChecks(), Interceptors: p.edge.interceptors,
		MeterProvider: p.telemetry.Meter, TracerProvider: p.telemetry.Tracer, TLS: p.edge.tls,
		ReadMaxBytes: p.edge.ReadMaxBytes, MaxConns: p.edge.MaxConns, MaxConnsPerAddress: p.edge.MaxConnsPerAddress,
		Budget: p.edge.budget, LocalNames: p.edge.NoAuth, Hosts: p.edge.NoAuthHosts,
	}, func(s *connect.Server) {
		opsv1connect.RegisterOpsServiceHandler(s, service)
		for _, f := range p.features {
			if f.operators != nil {
				f.operators(s)
			}
		}
	})
	server.Handle("GET "+console.Prefix, console.Pages())
	server.Handle("GET /{$}", redirect(strings.TrimPrefix(console.Prefix, "/")))
	return server
}

// redirect redirects to a relative path. http.Redirect would make it absolute, which is wrong behind a proxy that adds
// a prefix to our paths.
func redirect(to string) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Location", to)
		w.WriteHeader(http.StatusFound)
	})
}

func (p *process) consoleGroups() (groups []console.Group) {
	for _, g := range p.groups() {
		groups = append(groups, console.Group{Group: g.Group, Queue: g.queue.Name})
	}
	return groups
}

// consoleChecks returns the console's readiness checks. It needs neither the broker, since it shows that the broker is
// down, nor the clock.
func (p *process) consoleChecks() (needed []rpcserver.Check) {
	for _, check := range p.checks {
		if check.Name != "broker" && check.Name != "clock" {
			needed = append(needed, check)
		}
	}
	return needed
}
