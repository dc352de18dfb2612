package app

import (
	"context"
	"log/slog"
	"slices"

	"connectrpc.com/connect/v2"
	"example.com/shop/internal/changes"
	"example.com/shop/internal/operations"
	"example.com/shop/internal/rabbit"
	"example.com/shop/internal/rabbitrpc"
	"example.com/shop/internal/rpcserver"
)

// startQueueAPI serves the API over RabbitMQ, through the same interceptors and so with the same access as over HTTP.
func (p *process) startQueueAPI(ctx context.Context) {
	rpc := connect.NewServer(rpcserver.Interceptors(slog.Default(), p.interceptors()...)...)
	p.domain.register(rpc)
	p.calls.Register(rpc)
	server := rabbitrpc.NewServer(rabbitrpc.ServerConfig{
		URL: p.config.AMQPURL, Name: p.connectionName("rpc"), Prefetch: p.config.RPCPrefetch,
		RequestMaxBytes: p.edge.ReadMaxBytes, MaxBytes: p.config.Edge.inFlightBytes(),
		MeterProvider: p.telemetry.Meter, TracerProvider: p.telemetry.Tracer,
	}, rpc)
	p.group.Go(func() error { return server.Run(ctx) })
}

// Services returns the full names of the services that the API serves.
func Services() []string {
	return defaultDomain(nil, nil, changes.New(changes.Config{})).services() // this domain serves no call
}

func (d domain) services() []string {
	rpc := connect.NewServer()
	d.register(rpc)
	operations.New(nil, nil, changes.New(changes.Config{}), operations.Config{}).Register(rpc)
	var names []string
	for spec := range rpc.Specs() {
		names = append(names, rabbitrpc.ServiceOf(spec.Procedure))
	}
	slices.Sort(names)
	return slices.Compact(names)
}

// Permissions returns the minimal permissions of the broker's users: relay, consumer and console with a given
// topology, an API that serves RPCs from queues (rpc-server), and its callers (rpc-client).
func Permissions(exchange string) map[string]rabbit.Permissions {
	return defaultDomain(nil, nil, changes.New(changes.Config{})).permissions(exchange)
}

func (d domain) permissions(exchange string) map[string]rabbit.Permissions {
	topology := d.topology(exchange)
	return map[string]rabbit.Permissions{
		"relay": topology.PublisherPermissions(), "consumer": topology.ConsumerPermissions(),
		"console":    topology.ObserverPermissions(),
		"rpc-server": rabbitrpc.ServerPermissions(rabbitrpc.DefaultExchange, d.services()...),
		"rpc-client": rabbitrpc.ClientPermissions(rabbitrpc.DefaultExchange),
	}
}
