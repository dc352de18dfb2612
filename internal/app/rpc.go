package app

import (
	"context"
	"log/slog"
	"slices"

	"connectrpc.com/connect/v2"
	"example.com/orders/internal/changes"
	"example.com/orders/internal/rabbitrpc"
	"example.com/orders/internal/rpcserver"
)

// startQueueAPI serves over RabbitMQ what startAPI serves over HTTP, through the same interceptors: who may not call there may not call here.
func (p *process) startQueueAPI(ctx context.Context) {
	rpc := connect.NewServer(rpcserver.Interceptors(slog.Default(), p.interceptors()...)...)
	p.domain.register(rpc)
	p.calls.Register(rpc)
	server := rabbitrpc.NewServer(rabbitrpc.ServerConfig{
		URL: p.config.AMQPURL, Name: p.connectionName("rpc"), Prefetch: p.config.RPCPrefetch, RequestMaxBytes: p.edge.ReadMaxBytes,
		MeterProvider: p.telemetry.Meter, TracerProvider: p.telemetry.Tracer,
	}, rpc)
	p.group.Go(func() error { return server.Run(ctx) })
}

// Services returns the full names of the services that the API serves.
func Services() []string {
	rpc := connect.NewServer()
	newDomain(nil, nil, changes.New(changes.Config{})).register(rpc) // nothing is served with it
	var names []string
	for spec := range rpc.Specs() {
		names = append(names, rabbitrpc.ServiceOf(spec.Procedure))
	}
	slices.Sort(names)
	return slices.Compact(names)
}
