package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"example.com/shop/internal/changes"
	ordersv1 "example.com/shop/internal/gen/orders/v1"
	"example.com/shop/internal/inbox"
	"example.com/shop/internal/messaging"
	"example.com/shop/internal/orders"
	"example.com/shop/internal/outbox"
	"example.com/shop/internal/postgres"
	"example.com/shop/internal/rabbit"
	"github.com/jackc/pgx/v5/pgxpool"
	"golang.org/x/sync/errgroup"
)

const (
	latencyDuration = 8 * time.Second
	// warmUp is the time before the measurement. Meanwhile connections open and sessions prepare and plan statements.
	warmUp = time.Second
)

var latencyRow = row{
	name:  "latency",
	title: "Latency",
	how: "Orders arrive on schedule, even while earlier orders are in progress (an open loop, which measures a " +
		"standstill and does not skip it). The benchmark's process runs the parts of the three processes, wired as in " +
		"internal/app, each with its own connections and with the doorbell over NOTIFY. Commit: the handler has " +
		"returned. " +
		"Confirm: the relay has received the broker's confirm. Effect: the transaction of the fulfillment group that " +
		"reserves the stock has committed. At 200/s there are no consumers, and the raw contestant publishes the same " +
		"messages without a database.",
	limit: "Three consecutive trips to the disk (claim, queue, effect). From 500/s on, the processors, which the " +
		"servers share with the load.",
	contestants: []contestant{
		{name: "raw 200", run: rawLatency(200)},
		{name: "200", run: chain(200, false)},
		{name: "100", run: chain(100, true)},
		{name: "500", run: chain(500, true)},
		{name: "1000", run: chain(1000, true)},
	},
	lines: []line{
		{label: "publish → confirm, 200/s, no database, p50", contestant: "raw 200", metric: "confirm p50", unit: "ms"},
		{label: "publish → confirm, 200/s, no database, p99", contestant: "raw 200", metric: "confirm p99", unit: "ms"},
		{label: "commit → confirm, 200/s, p50", contestant: "200", metric: "confirm p50", unit: "ms",
			against: "raw 200", most: 2},
		{label: "commit → confirm, 200/s, p99", contestant: "200", metric: "confirm p99", unit: "ms",
			against: "raw 200"},
		{label: "commit → confirm, 100/s, p50", contestant: "100", metric: "confirm p50", unit: "ms"},
		{label: "commit → confirm, 100/s, p99", contestant: "100", metric: "confirm p99", unit: "ms"},
		{label: "commit → effect, 100/s, p50", contestant: "100", metric: "effect p50", unit: "ms"},
		{label: "commit → effect, 100/s, p99", contestant: "100", metric: "effect p99", unit: "ms"},
		{label: "commit → confirm, 500/s, p50", contestant: "500", metric: "confirm p50", unit: "ms", most: 4},
		{label: "commit → confirm, 500/s, p99", contestant: "500", metric: "confirm p99", unit: "ms", most: 25},
		{label: "commit → effect, 500/s, p50", contestant: "500", metric: "effect p50", unit: "ms"},
		{label: "commit → effect, 500/s, p99", contestant: "500", metric: "effect p99", unit: "ms"},
		{label: "commit → confirm, 1,000/s, p50", contestant: "1000", metric: "confirm p50", unit: "ms"},
		{label: "commit → confirm, 1,000/s, p99", contestant: "1000", metric: "confirm p99", unit: "ms"},
		{label: "commit → effect, 1,000/s, p50", contestant: "1000", metric: "effect p50", unit: "ms"},
		{label: "commit → effect, 1,000/s, p99", contestant: "1000", metric: "effect p99", unit: "ms"},
	},
}

// rawLatency publishes from memory, one message per call.
func rawLatency(perSecond int) func(ctx context.Context, b *bench) (measured, error) {
	return func(ctx context.Context, b *bench) (found measured, err error) {
		err = b.withQueue(ctx, topology, func() error {
			to, err := openConfirming(b.AMQPURL)
			if err != nil {
				return err
			}
			defer to.close()
			watch := newStopwatch()
			publish := func(ctx context.Context) error {
				message := makeMessages(1)[0]
				watch.start(message.ID.String())
				confirm, err := to.publish(message)
				if err == nil && !confirm.Wait() {
					err = fmt.Errorf("not confirmed")
				}
				watch.stop(message.ID.String())
				return err
			}
			found, err = underLoad(ctx, perSecond, map[string]*stopwatch{"confirm": watch}, publish)
			return err
		})
		return found, err
	}
}

// underLoad calls fn at a rate, and returns the percentiles of the stopwatches after the warm-up.
func underLoad(
	ctx context.Context, perSecond int, watches map[string]*stopwatch, fn func(ctx context.Context) error,
) (measured, error) {
	if err := openLoop(ctx, perSecond, warmUp, fn); err != nil {
		return nil, err
	}
	for _, watch := range watches {
		watch.reset()
	}
	if err := openLoop(ctx, perSecond, latencyDuration, fn); err != nil {
		return nil, err
	}
	found := measured{}
	for name, watch := range watches {
		all, err := watch.settled(ctx)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		found[name+" p50"], found[name+" p99"] = milliseconds(all, 50), milliseconds(all, 99)
	}
	return found, nil
}

// chain measures an order from the handler's return to the confirm, and with consumers also to the effect.
func chain(perSecond int, consumers bool) func(ctx context.Context, b *bench) (measured, error) {
	return func(ctx context.Context, b *bench) (found measured, err error) {
		err = b.withParts(ctx, func(p *parts) error {
			return p.run(ctx, consumers, func(ctx context.Context) error {
				watches := map[string]*stopwatch{"confirm": p.confirm}
				if consumers {
					watches["effect"] = p.effect
				}
				found, err = underLoad(ctx, perSecond, watches, p.place)
				return err
			})
		})
		return found, err
	}
}

// withParts calls fn with the parts of a service with stock. They use a fresh database and fresh queues.
func (b *bench) withParts(ctx context.Context, fn func(p *parts) error) error {
	return b.withDatabase(ctx, nothing, migrated, func(url string) error {
		return withPool(ctx, postgres.Config{URL: url}, func(db *pgxpool.Pool) error {
			bell := outbox.NewNotifyBell(url)
			out := outbox.NewWriter(db, bell, nil)
			service := orders.NewService(db, out, changes.New(changes.Config{}), orders.Config{})
			if err := stockUp(ctx, service); err != nil {
				return err
			}
			p := &parts{
				bench: b, url: url, service: service, bell: bell, topology: topologyOf(service),
				confirm: newStopwatch(), effect: newStopwatch(),
			}
			return b.withQueue(ctx, p.topology, func() error { return fn(p) })
		})
	})
}

func stockUp(ctx context.Context, service *orders.Service) error {
	for i := range skus {
		stock := &ordersv1.SetStockRequest{Sku: fmt.Sprintf("sku-%d", i), Total: 1_000_000}
		if _, err := service.SetStock(ctx, stock); err != nil {
			return err
		}
	}
	return nil
}

func topologyOf(service *orders.Service) rabbit.Topology {
	found := rabbit.Topology{Exchange: exchange}
	for _, group := range []*inbox.Group{service.Fulfillment(), service.Notifications()} {
		found.Queues = append(found.Queues, rabbit.Queue{Name: "bench." + group.Name(), Types: group.Types()})
	}
	return found
}

// parts contains the parts of the service's processes, wired as in internal/app, with stopwatches in two places.
type parts struct {
	*bench
	url             string
	service         *orders.Service
	bell            *outbox.NotifyBell
	topology        rabbit.Topology
	confirm, effect *stopwatch // by order ID
	throttle        func(handle rabbit.Handler) rabbit.Handler
}

func (p *parts) place(ctx context.Context) error {
	order := newOrder()
	if _, err := p.service.PlaceOrder(ctx, order); err != nil {
		return err
	}
	p.confirm.start(order.GetOrderId())
	p.effect.start(order.GetOrderId())
	return nil
}

// run calls fn while the parts run.
func (p *parts) run(ctx context.Context, consumers bool, fn func(ctx context.Context) error) error {
	return withPool(ctx, relayPool(p.url), func(relayDB *pgxpool.Pool) error {
		return withPool(ctx, postgres.Config{URL: p.url}, func(db *pgxpool.Pool) error {
			ctx, cancel := context.WithCancel(ctx)
			group, ctx := errgroup.WithContext(ctx)
			group.Go(func() error { p.bell.Run(ctx); return nil })
			relay := newRelay(p.flags, relayDB, p.topology, func(to messaging.Publisher) messaging.Publisher {
				return &watchedPublisher{to, p.sawConfirm}
			})
			group.Go(func() error { return relay.Run(ctx) })
			group.Go(func() error { relay.Listen(ctx, p.url); return nil })
			if consumers {
				p.startConsumers(ctx, group, db)
			}
			err := fn(ctx)
			cancel()
			return errors.Join(err, group.Wait())
		})
	})
}

func (p *parts) startConsumers(ctx context.Context, group *errgroup.Group, db *pgxpool.Pool) {
	bell := outbox.NewNotifyBell(p.url)
	group.Go(func() error { bell.Run(ctx); return nil })
	for _, consumers := range []*inbox.Group{p.service.Fulfillment(), p.service.Notifications()} {
		box := inbox.New(db, consumers, inbox.Config{AfterCommit: bell.Ring})
		config := rabbit.ConsumerConfig{
			URL: p.AMQPURL, Topology: p.topology, Queue: "bench." + consumers.Name(), Prefetch: prefetch,
		}
		handle := watching(box.Process, p.sawEffects)
		if p.throttle != nil {
			handle = p.throttle(handle)
		}
		consumer := rabbit.NewConsumer(config, handle)
		group.Go(func() error { return consumer.Run(ctx) })
		group.Go(func() error { return box.Run(ctx) })
	}
}

func (p *parts) sawConfirm(m messaging.Message) {
	if m.Type == placedType {
		p.confirm.stop(m.Key)
	}
}

func (p *parts) sawEffects(deliveries []messaging.Delivery) {
	for _, delivery := range deliveries {
		if delivery.Type == placedType {
			p.effect.stop(delivery.Key)
		}
	}
}

var placedType = string((&ordersv1.OrderPlaced{}).ProtoReflect().Descriptor().FullName())
