package app

import (
	"context"
	"errors"
	"log/slog"

	"example.com/shop/internal/changes"
	"example.com/shop/internal/deadletter"
	"example.com/shop/internal/inbox"
	"example.com/shop/internal/messaging"
	"example.com/shop/internal/ops"
	"example.com/shop/internal/outbox"
	"example.com/shop/internal/postgres"
	"example.com/shop/internal/rabbit"
)

// Topology returns the exchange and queues that the service's groups need.
func Topology(exchange string) rabbit.Topology {
	return defaultDomain(nil, nil, changes.New(changes.Config{})).topology(exchange) // this domain handles no message
}

func (d domain) topology(exchange string) rabbit.Topology {
	topology := rabbit.Topology{Exchange: exchange}
	for _, group := range d.groups {
		topology.Queues = append(topology.Queues, rabbit.Queue{Name: queueName(group), Types: group.Types()})
	}
	topology.Queues = append(topology.Queues, callsQueue)
	return topology
}

// topology returns the same for this process, which declares it when it connects, unless Config.TopologyGiven.
func (p *process) topology() rabbit.Topology {
	topology := p.domain.topology(p.config.Exchange)
	topology.Given = p.config.TopologyGiven
	return topology
}

func queueName(g group) string { return ServiceName + "." + g.Name() }

func (p *process) startRelay(ctx context.Context) {
	p.needBroker()
	newPublisher := func() messaging.Publisher {
		return rabbit.NewPublisher(rabbit.PublisherConfig{
			URL: p.config.AMQPURL, Topology: p.topology(), Name: p.connectionName("relay"),
			Window: p.config.Relay.MaxInFlight(), MeterProvider: p.telemetry.Meter,
		})
	}
	config := p.config.Relay
	config.MeterProvider, config.TracerProvider = p.telemetry.Meter, p.telemetry.Tracer
	relay := outbox.NewRelay(p.relayDB, newPublisher, config)
	err := errors.Join(
		postgres.ObservePool(p.relayDB, "relay", p.telemetry.Meter),
		ops.ObserveHolders(p.relayDB, p.telemetry.Meter),
		deadletter.ObserveOpen(p.relayDB, p.telemetry.Meter),
	)
	if err != nil {
		slog.WarnContext(ctx, "metrics are incomplete", "error", err)
	}
	p.group.Go(func() error { return p.afterCheck(relay.Run) })
	if url := p.config.listenURL(); url != "" {
		p.group.Go(func() error { relay.Listen(ctx, url); return nil })
	}
}

// deliveryBytes returns each consumer's share of the memory budget for messages in flight. A group has two consumers:
// one for its queue and one for its dead queue.
func (p *process) deliveryBytes() int64 {
	const least = 4 << 20 // four messages of the largest size that the outbox accepts
	consumers := 2 * int64(len(p.domain.groups)+1)
	return max(least, p.config.Edge.inFlightBytes()/consumers)
}

func (p *process) startConsumer(ctx context.Context) {
	p.needBroker()
	meters := p.telemetry.Meter
	for _, group := range p.domain.groups {
		config := inboxConfig
		config.AfterCommit, config.MeterProvider, config.TracerProvider = p.bell.Ring, meters, p.telemetry.Tracer
		box := inbox.New(p.db, group.Group, config)
		consumer := rabbit.NewConsumer(rabbit.ConsumerConfig{
			URL: p.config.AMQPURL, Topology: p.topology(), Queue: queueName(group),
			Name:  p.connectionName("consumer " + group.Name()),
			Lanes: group.lanes, Prefetch: p.config.Prefetch, Batch: p.config.Batch, MaxBytes: p.deliveryBytes(),
			MeterProvider: meters,
		}, box.Process)
		drain := rabbit.NewConsumer(rabbit.ConsumerConfig{
			URL: p.config.AMQPURL, Topology: p.topology(), Queue: rabbit.DeadQueue(queueName(group)),
			Name:     p.connectionName("drain " + group.Name()),
			MaxBytes: p.deliveryBytes(), MeterProvider: meters,
		}, box.Drain)
		p.group.Go(func() error {
			return p.afterCheck(func(ctx context.Context) error { return box.WhileResumed(ctx, consumer.Run) })
		})
		p.group.Go(func() error { return p.afterCheck(drain.Run) })
		p.group.Go(func() error { return p.afterCheck(box.Run) })
	}
	p.startCalls()
}
