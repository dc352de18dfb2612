package app

import (
	"context"
	"errors"
	"log/slog"

	"connectrpc.com/connect/v2"
	"example.com/shop/internal/clients"
	"example.com/shop/internal/rabbit"
	"example.com/shop/internal/rabbitrpc"
	"example.com/shop/internal/rpcserver"
)

// RPCOverRabbitMQ configures the API over RabbitMQ.
type RPCOverRabbitMQ struct {
	// Serve makes the API also serve its RPCs from queues. It needs AMQPURL; readiness still does not depend on the
	// broker.
	Serve bool
	// Prefetch bounds how many calls of one service the API executes at once for the queues.
	Prefetch int
}

func rpcOverRabbitMQ(p *process) feature {
	return feature{startAPI: p.startQueueAPI, permissions: p.rpcPermissions}
}

// startQueueAPI serves the API over RabbitMQ, through the same interceptors and so with the same access as over HTTP.
func (p *process) startQueueAPI(ctx context.Context) {
	if !p.config.RPCOverRabbitMQ.Serve {
		return
	}
	rpc := connect.NewServer(rpcserver.Interceptors(slog.Default(), p.interceptors()...)...)
	p.register(rpc)
	server := rabbitrpc.NewServer(rabbitrpc.ServerConfig{
		URL: p.config.AMQPURL, Name: p.connectionName("rpc"), Prefetch: p.config.RPCOverRabbitMQ.Prefetch,
		RequestMaxBytes: p.edge.ReadMaxBytes, MaxBytes: p.config.Edge.inFlightBytes(),
		MeterProvider: p.telemetry.Meter, TracerProvider: p.telemetry.Tracer,
	}, rpc)
	p.group.Go(func() error { return server.Run(ctx) })
}

// clientOverRabbitMQ returns a client of services that serve their RPCs over RabbitMQ, at an AMQP URL whose user has
// the permissions of rpc-client that `topology` prints. It is otherwise like client.
func (d deps) clientOverRabbitMQ(url string, config clients.Config) (*connect.Client, error) {
	if d.namesOnly {
		url = "amqp://unused"
	}
	if err := rabbit.ValidateURL(url); err != nil {
		return nil, errors.New("not an AMQP URL, such as amqp://user:password@host:5672/vhost")
	}
	config = d.measured(config)
	transport := rabbitrpc.NewTransport(rabbitrpc.TransportConfig{
		URL: url, Name: d.process.connectionName("client"),
		MeterProvider: config.MeterProvider, TracerProvider: config.TracerProvider,
	})
	d.process.closers = append(d.process.closers, func() { _ = transport.Close() })
	return clients.New(transport, config), nil
}

// Services returns the full names of the services that the API serves.
func Services() ([]string, error) {
	p, err := declared(Config{})
	if err != nil {
		return nil, err
	}
	return p.services(), nil
}

// rpcPermissions returns the minimal permissions of an API that serves RPCs from queues, and of its callers.
func (p *process) rpcPermissions() map[string]rabbit.Permissions {
	return map[string]rabbit.Permissions{
		"rpc-server": rabbitrpc.ServerPermissions(rabbitrpc.DefaultExchange, p.services()...),
		"rpc-client": rabbitrpc.ClientPermissions(rabbitrpc.DefaultExchange),
	}
}
