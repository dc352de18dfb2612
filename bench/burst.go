package main

import (
	"context"
	"fmt"
	"time"

	"example.com/shop/internal/messaging"
	"example.com/shop/internal/rabbit"
	"golang.org/x/sync/errgroup"
	throttle "golang.org/x/time/rate"
)

const (
	burstRate      = 200
	burstConsumers = burstRate / 10
	burstDuration  = 8 * time.Second
)

var burstRow = row{
	name:  "burst",
	title: "Burst",
	how: fmt.Sprintf("Orders arrive over HTTP at %d/s, in an open loop. Idle queue: the consumers keep up. Burst: they "+
		"take %d/s, so the queue grows throughout. After the burst they run at full speed again, until the last "+
		"order has "+
		"its effect. Latency is that of the call.", burstRate, burstConsumers),
	limit: "The disk: each order's commit waits for it. A call never looks at the queue.",
	contestants: []contestant{
		{name: "idle queue", run: burst(burstRate * 100)},
		{name: "burst", run: burst(burstConsumers)},
	},
	lines: []line{
		{label: "PlaceOrder, queue idle, p50", contestant: "idle queue", metric: "call p50", unit: "ms"},
		{label: "PlaceOrder, queue idle, p99", contestant: "idle queue", metric: "call p99", unit: "ms"},
		{label: "PlaceOrder, 10 times what consumers take, p50", contestant: "burst", metric: "call p50", unit: "ms",
			against: "idle queue"},
		{label: "PlaceOrder, 10 times what consumers take, p99", contestant: "burst", metric: "call p99", unit: "ms",
			against: "idle queue", most: 2},
		{label: "without effect when the burst is over", contestant: "burst", metric: "left", unit: "orders"},
		{label: "until all have it", contestant: "burst", metric: "drained", unit: "s"},
	},
}

// burst measures calls while consumers take a limited number of orders a second, and then the time that unlimited
// consumers need for the rest.
func burst(consumersTake throttle.Limit) func(ctx context.Context, b *bench) (measured, error) {
	return func(ctx context.Context, b *bench) (found measured, err error) {
		err = b.withParts(ctx, func(p *parts) error {
			limit := throttle.NewLimiter(consumersTake, 1)
			p.throttle = func(handle rabbit.Handler) rabbit.Handler {
				return func(ctx context.Context, deliveries []messaging.Delivery) error {
					for range deliveries {
						if err := limit.Wait(ctx); err != nil {
							return err
						}
					}
					return handle(ctx, deliveries)
				}
			}
			return p.run(ctx, true, func(ctx context.Context) error {
				server, ctx := errgroup.WithContext(ctx)
				ctx, cancel := context.WithCancel(ctx)
				defer func() { cancel(); _ = server.Wait() }()
				call, err := serve(ctx, server, p.service)
				if err != nil {
					return err
				}
				calls := newStopwatch()
				load := func(duration time.Duration) error {
					return openLoop(ctx, burstRate, duration, func(ctx context.Context) error {
						order := newOrder()
						calls.start(order.GetOrderId())
						_, err := call(ctx, order)
						calls.stop(order.GetOrderId())
						p.effect.start(order.GetOrderId())
						return err
					})
				}
				if err := load(warmUp); err != nil {
					return err
				}
				calls.reset()
				if err := load(burstDuration); err != nil {
					return err
				}
				took, _ := calls.times()
				_, left := p.effect.times()
				limit.SetLimit(throttle.Inf)
				over := time.Now()
				if _, err := p.effect.settled(ctx); err != nil {
					return fmt.Errorf("drain: %w", err)
				}
				found = measured{
					"call p50": milliseconds(took, 50), "call p99": milliseconds(took, 99),
					"left": float64(left), "drained": time.Since(over).Seconds(),
				}
				return nil
			})
		})
		return found, err
	}
}
