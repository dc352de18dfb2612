package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"example.com/shop/internal/inbox"
	"example.com/shop/internal/postgres"
	"example.com/shop/internal/rabbit"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	amqp "github.com/rabbitmq/amqp091-go"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

const (
	consumeMessages = 20_000
	// consumeSlowly is for contestants that commit every message separately.
	consumeSlowly = 2_000
	prefetch      = 300
)

var consumeRow = row{
	name:  "consume",
	title: "Consumer vs. raw acks",
	how: fmt.Sprintf("A queue of %d messages (%d for the last two). Raw: consume without any work, with one ack for a "+
		"hundred messages. Batch: the service's inbox, whose handler inserts one row. Single: the same with one "+
		"message "+
		"per transaction. Plain: the loop that everybody writes; one transaction per message inserts its ID on "+
		"conflict do "+
		"nothing and its effect, then the loop acks. All use prefetch %d and one goroutine.",
		consumeMessages, consumeSlowly, prefetch),
	limit: "Postgres: one round trip for each handler's statement. With one commit per message also the disk.",
	contestants: []contestant{
		{name: "raw", run: consume(consumeMessages, consumeRaw)},
		{name: "batch", run: consume(consumeMessages, consumeInbox(0))},
		{name: "single", run: consume(consumeSlowly, consumeInbox(1))},
		{name: "plain", run: consume(consumeSlowly, consumePlain)},
	},
	lines: []line{
		{label: "raw consume and ack", contestant: "raw", metric: rate, unit: "msg/s"},
		{label: "one-row effect, batch", contestant: "batch", metric: rate, unit: "msg/s", against: "raw"},
		{label: "one-row effect, batch", contestant: "batch", metric: rate, unit: "msg/s", against: "plain", least: 5},
		{label: "one-row effect, single", contestant: "single", metric: rate, unit: "msg/s", against: "plain"},
		{label: "one transaction a message, plain", contestant: "plain", metric: rate, unit: "msg/s"},
	},
}

// consumer takes deliveries until ctx is done, and calls done with the number that it has finished.
type consumer func(ctx context.Context, b *bench, db *pgxpool.Pool, done func(n int)) error

// consume measures a consumer on a queue of n messages. The clock runs from its first finished message to its last.
func consume(n int, run consumer) func(ctx context.Context, b *bench) (measured, error) {
	return func(ctx context.Context, b *bench) (found measured, err error) {
		n := b.some(n)
		prepare := func(ctx context.Context, url string) error {
			if err := migrated(ctx, url); err != nil {
				return err
			}
			return execute(ctx, url,
				`CREATE TABLE effect (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, payload bytea NOT NULL)`,
				`CREATE TABLE plain_inbox (message_id uuid PRIMARY KEY, received_at timestamptz NOT NULL DEFAULT now())`)
		}
		err = b.withDatabase(ctx, "effects", prepare, func(url string) error {
			return b.withQueue(ctx, topology, func() error {
				to, err := openConfirming(b.AMQPURL)
				if err != nil {
					return err
				}
				err = to.publishAll(makeMessages(n), window)
				to.close()
				if err != nil {
					return err
				}
				return withPool(ctx, postgres.Config{URL: url}, func(db *pgxpool.Pool) error {
					found, err = countUntil(ctx, n, func(ctx context.Context, done func(n int)) error {
						return run(ctx, b, db, done)
					})
					return err
				})
			})
		})
		return found, err
	}
}

// countUntil runs fn until n messages are done, and returns the rate between the first and the last.
func countUntil(ctx context.Context, n int, fn func(ctx context.Context, done func(n int)) error) (measured, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Minute)
	defer cancel()
	meter := &countdown{want: n, end: cancel}
	err := fn(ctx, meter.done)
	if err != nil && !errors.Is(err, context.Canceled) {
		return nil, err
	}
	return meter.rate()
}

func consumeRaw(ctx context.Context, b *bench, _ *pgxpool.Pool, done func(n int)) error {
	return eachDelivery(ctx, b, func(i int, delivery *amqp.Delivery) error {
		done(1)
		if i%100 != 0 {
			return nil
		}
		return delivery.Ack(true)
	})
}

func consumeInbox(batch int) consumer {
	return func(ctx context.Context, b *bench, db *pgxpool.Pool, done func(n int)) error {
		group := inbox.NewGroup("bench")
		inbox.Handle(group, func(ctx context.Context, tx pgx.Tx, event *wrapperspb.BytesValue) error {
			_, err := tx.Exec(ctx, effectSQL, event.GetValue())
			return err
		})
		box := inbox.New(db, group, inbox.Config{})
		config := rabbit.ConsumerConfig{
			URL: b.AMQPURL, Topology: topology, Queue: queue, Prefetch: prefetch, Batch: batch,
		}
		return rabbit.NewConsumer(config, counting(box.Process, done)).Run(ctx)
	}
}

const effectSQL = `INSERT INTO effect (payload) VALUES ($1)`

func consumePlain(ctx context.Context, b *bench, db *pgxpool.Pool, done func(n int)) error {
	return eachDelivery(ctx, b, func(_ int, delivery *amqp.Delivery) error {
		err := pgx.BeginFunc(ctx, db, func(tx pgx.Tx) error {
			tag, err := tx.Exec(ctx, `INSERT INTO plain_inbox (message_id) VALUES ($1) ON CONFLICT DO NOTHING`,
				delivery.MessageId)
			if err != nil || tag.RowsAffected() == 0 {
				return err
			}
			_, err = tx.Exec(ctx, effectSQL, delivery.Body)
			return err
		})
		if err != nil {
			return err
		}
		done(1)
		return delivery.Ack(false)
	})
}

// eachDelivery calls fn for each delivery in turn, counted from 1.
func eachDelivery(ctx context.Context, b *bench, fn func(i int, delivery *amqp.Delivery) error) error {
	conn, err := amqp.Dial(b.AMQPURL)
	if err != nil {
		return err
	}
	defer conn.Close()
	ch, err := conn.Channel()
	if err != nil {
		return err
	}
	if err := ch.Qos(prefetch, 0, false); err != nil {
		return err
	}
	source, err := ch.ConsumeWithContext(ctx, queue, "", false, false, false, false, nil)
	if err != nil {
		return err
	}
	i := 0
	for delivery := range source {
		if ctx.Err() != nil {
			return nil
		}
		i++
		if err := fn(i, &delivery); err != nil {
			return err
		}
	}
	return ctx.Err()
}
