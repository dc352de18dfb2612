package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"time"

	"example.com/shop/internal/messaging"
	"example.com/shop/internal/outbox"
	"example.com/shop/internal/postgres"
	"example.com/shop/internal/rabbit"
	"github.com/jackc/pgx/v5/pgxpool"
)

const relayMessages = 50_000

var relayRow = row{
	name:  "relay",
	title: "Relay vs. raw confirms",
	how: fmt.Sprintf("%d messages of %d bytes. Raw: the client library publishes from memory on one channel, with %d "+
		"pipelined confirms, as many as the relay has in flight. Relay: a separate process drains an outbox of as many "+
		"messages, from its first claim to its last recorded delivery.", relayMessages, payloadBytes, window),
	limit: "RabbitMQ, which writes every message to its log. Reading and claiming cost the relay time, but it makes up " +
		"for most of that with fewer system calls.",
	shortTurns: 4,
	contestants: []contestant{
		{name: "raw", run: runRaw},
		{name: "relay, 1 shard", run: drain(relayMessages, 1)},
		{name: "relay, 4 shards", run: drain(relayMessages, 4)},
	},
	lines: []line{
		{label: "raw pipelined confirms", contestant: "raw", metric: rate, unit: "msg/s"},
		{label: "relay, 1 shard", contestant: "relay, 1 shard", metric: rate, unit: "msg/s",
			against: "raw", least: 0.9},
		{label: "relay, 4 shards", contestant: "relay, 4 shards", metric: rate, unit: "msg/s", against: "raw"},
		{label: "relay, 1 shard", contestant: "relay, 1 shard", metric: memory, unit: "MiB", most: 100},
	},
}

// window is the maximum number of unconfirmed messages of the raw publisher.
var window = outbox.Config{}.MaxInFlight()

func runRaw(ctx context.Context, b *bench) (found measured, err error) {
	messages := makeMessages(b.some(relayMessages))
	err = b.withQueue(ctx, topology, func() error {
		to, err := openConfirming(b.AMQPURL)
		if err != nil {
			return err
		}
		defer to.close()
		began := time.Now()
		err = to.publishAll(messages, window)
		found = measured{rate: float64(len(messages)) / time.Since(began).Seconds()}
		return err
	})
	return found, err
}

// relayCommand runs the relay as the service does.
type relayCommand struct{}

func (c *relayCommand) Run(ctx context.Context, f *flags) error {
	return withPool(ctx, relayPool(f.PostgresURL), func(db *pgxpool.Pool) error {
		return newRelay(f, db, topology, nil).Run(ctx)
	})
}

// relayPool configures the pool as internal/app does.
func relayPool(url string) postgres.Config {
	return postgres.Config{URL: url, MaxConns: 8, GenericPlans: true, IdleInTransaction: 5 * time.Second}
}

// newRelay makes a relay as internal/app does. wrap may wrap its publisher.
func newRelay(
	f *flags, db *pgxpool.Pool, topology rabbit.Topology, wrap func(messaging.Publisher) messaging.Publisher,
) *outbox.Relay {
	return outbox.NewRelay(db, func() messaging.Publisher {
		config := rabbit.PublisherConfig{URL: f.AMQPURL, Topology: topology, Window: window}
		var publisher messaging.Publisher = rabbit.NewPublisher(config)
		if wrap != nil {
			publisher = wrap(publisher)
		}
		return publisher
	}, outbox.Config{})
}

// drain measures a relay on a backlog of n.
func drain(n, shards int) func(ctx context.Context, b *bench) (measured, error) {
	return func(ctx context.Context, b *bench) (measured, error) {
		return drainDisturbed(ctx, b, n, n, shards, nil)
	}
}

// drainDisturbed measures a relay in a separate process that publishes the first part of a backlog during a
// disturbance. The clock runs from the cursor's first claim to its last move by the database's clock, so the start of
// the process does not count.
func drainDisturbed(
	ctx context.Context, b *bench, n, part, shards int, disturb disturbance,
) (found measured, err error) {
	n, part = b.some(n), b.some(part)
	content := fmt.Sprintf("backlog of %d in %d shards", n, shards)
	err = b.withDatabase(ctx, content, backlog(n, shards), func(url string) error {
		if disturb != nil {
			end, err := disturb(ctx, url)
			if err != nil {
				return err
			}
			defer end()
		}
		return b.withQueue(ctx, topology, func() error {
			return withPool(ctx, postgres.Config{URL: url}, func(db *pgxpool.Pool) error {
				self, err := os.Executable()
				if err != nil {
					return err
				}
				environment := []string{"POSTGRES_URL=" + url, "AMQP_URL=" + b.AMQPURL}
				return withProcess(exec.Command(self, "run-relay"), environment, func(pid int) error {
					took, published, err := watchCursor(ctx, db, part)
					found = measured{rate: float64(published) / took.Seconds(), memory: maxRSS(pid)}
					return err
				})
			})
		})
	})
	return found, err
}

const cursorSQL = `SELECT sum(published)::bigint, bool_or(claimed IS NOT NULL), clock_timestamp() FROM outbox_cursor`

// watchCursor waits until n messages are published. It returns the time that this took, and the exact number of
// messages.
func watchCursor(ctx context.Context, db *pgxpool.Pool, n int) (took time.Duration, published int, err error) {
	var claimed time.Time
	for began := time.Now(); time.Since(began) < 5*time.Minute; {
		var now time.Time
		var isClaimed bool
		if err := db.QueryRow(ctx, cursorSQL).Scan(&published, &isClaimed, &now); err != nil {
			return 0, 0, err
		}
		if isClaimed && claimed.IsZero() {
			claimed = now
		}
		if published >= n {
			return now.Sub(claimed), published, nil
		}
		time.Sleep(10 * time.Millisecond) // rare enough not to slow the relay
	}
	return 0, 0, fmt.Errorf("published %d of %d after 5 minutes", published, n)
}
