package app

import (
	"context"
	"errors"
	"log/slog"
	"maps"
	"slices"
	"strings"

	"connectrpc.com/connect/v2"
	"example.com/shop/internal/deadletter"
	"example.com/shop/internal/inbox"
	"example.com/shop/internal/messaging"
	"example.com/shop/internal/ops"
	"example.com/shop/internal/outbox"
	"example.com/shop/internal/postgres"
	"example.com/shop/internal/rabbit"
)

// Topology returns the exchange and queues that the service's groups need.
func Topology(exchange string) (rabbit.Topology, error) {
	p, err := declared(Config{Exchange: exchange})
	if err != nil {
		return rabbit.Topology{}, err
	}
	return p.topology(), nil
}

// topology returns the topology, which the process declares when it connects, unless Config.TopologyGiven.
func (p *process) topology() rabbit.Topology {
	topology := rabbit.Topology{Exchange: p.config.Exchange, Given: p.config.TopologyGiven}
	for _, group := range p.groups() {
		topology.Queues = append(topology.Queues, group.queue)
	}
	topology.Packages = p.publishes
	return topology
}

// services returns the full names of the services for callers.
func (p *process) services() []string {
	rpc := connect.NewServer()
	p.register(rpc)
	var names []string
	for spec := range rpc.Specs() {
		service, _, _ := strings.Cut(strings.TrimPrefix(spec.Procedure, "/"), "/")
		names = append(names, service)
	}
	slices.Sort(names)
	return slices.Compact(names)
}

// packages returns the proto packages of the messages that the service publishes: those of its services, and those
// that the domain lists.
func (p *process) packages() []string {
	names := slices.Clone(p.domain.publishes)
	for _, service := range p.services() {
		if i := strings.LastIndexByte(service, '.'); i > 0 {
			names = append(names, service[:i])
		}
	}
	slices.Sort(names)
	return slices.Compact(names)
}

// Permissions returns the minimal permissions of the broker's users with a given topology, by user: relay, consumer,
// and the users of the features.
func Permissions(exchange string) (map[string]rabbit.Permissions, error) {
	p, err := declared(Config{Exchange: exchange})
	if err != nil {
		return nil, err
	}
	return p.permissions(), nil
}

func (p *process) permissions() map[string]rabbit.Permissions {
	topology := p.topology()
	all := map[string]rabbit.Permissions{
		"relay": topology.PublisherPermissions(), "consumer": topology.ConsumerPermissions(),
	}
	for _, f := range p.features {
		if f.permissions != nil {
			maps.Copy(all, f.permissions())
		}
	}
	return all
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
	config.Handled = p.topology().Types()
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
	consumers := 2 * int64(len(p.groups()))
	return max(least, p.config.Edge.inFlightBytes()/max(1, consumers))
}

func (p *process) startConsumer(ctx context.Context) {
	p.needBroker()
	groups := p.groups()
	for i, group := range p.domain.groups {
		config := inboxConfig
		config.AfterCommit = p.bell.Ring
		config.MeterProvider, config.TracerProvider = p.telemetry.Meter, p.telemetry.Tracer
		p.consume(groups[i], inbox.New(p.db, group.Group, config), rabbit.ConsumerConfig{
			Lanes: group.lanes, Prefetch: p.config.Prefetch, Batch: p.config.Batch,
		})
	}
	p.startFeatures(ctx, func(f feature) func(context.Context) { return f.startConsumer })
}

// box applies the messages of a consumer group, once each.
type box interface {
	Process(ctx context.Context, deliveries []messaging.Delivery) error
	Drain(ctx context.Context, deliveries []messaging.Delivery) error
	WhileResumed(ctx context.Context, part func(ctx context.Context) error) error
	Run(ctx context.Context) error
}

// consume consumes from a group's queue, with the given config, and from its dead queue.
func (p *process) consume(group queueGroup, box box, config rabbit.ConsumerConfig) {
	config.URL, config.Topology, config.Queue = p.config.AMQPURL, p.topology(), group.queue.Name
	config.MaxBytes, config.MeterProvider = p.deliveryBytes(), p.telemetry.Meter
	dead := rabbit.ConsumerConfig{
		URL: config.URL, Topology: config.Topology, Queue: rabbit.DeadQueue(group.queue.Name),
		MaxBytes: config.MaxBytes, MeterProvider: config.MeterProvider, Name: p.connectionName("drain " + group.Name),
	}
	config.Name = p.connectionName("consumer " + group.Name)
	consumer, drain := rabbit.NewConsumer(config, box.Process), rabbit.NewConsumer(dead, box.Drain)
	p.group.Go(func() error {
		return p.afterCheck(func(ctx context.Context) error { return box.WhileResumed(ctx, consumer.Run) })
	})
	p.group.Go(func() error { return p.afterCheck(drain.Run) })
	p.group.Go(func() error { return p.afterCheck(box.Run) })
}
