package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"example.com/shop/internal/messaging"
	"example.com/shop/internal/outbox"
	"example.com/shop/internal/postgres"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"golang.org/x/sync/errgroup"
)

const (
	peerMessages = 20_000
	// peerSlowly is for peers that forward one message after the other.
	peerSlowly = 2_000
)

// peer is an outbox.
type peer struct {
	name    string
	prepare func(ctx context.Context, url string) error
	// insert returns a function that commits a transaction with messages.
	insert func(ctx context.Context, url string) (insert insertFunc, end func(), err error)
	// relay publishes until ctx is done, and calls confirmed for each message that the broker has confirmed.
	relay func(ctx context.Context, b *bench, url string, confirmed func(id string)) error
}

type insertFunc func(ctx context.Context, messages ...messaging.Message) error

var peersRow = row{
	name:  "peers",
	title: "Peers, draining",
	how: fmt.Sprintf("A backlog of %d messages (Watermill and River with defaults: %d) goes to the same queue with "+
		"confirms, timed from the first confirm to the last. River: the transaction inserts jobs, and workers "+
		"publish and "+
		"wait for the confirm. Its defaults are 100 workers (as in its documentation) and a fetch every 100 ms. "+
		"Tuned, it "+
		"has 500 workers that share one channel, which pipelines confirms, and the shortest fetch cooldown it accepts "+
		"(1 ms). Watermill: its forwarder reads from watermill-sql (batches of 1,000, polling every 10 ms) and "+
		"publishes "+
		"with ConfirmDelivery and a pooled channel. SKIP LOCKED loop: select 500 rows FOR UPDATE SKIP LOCKED, publish "+
		"them with pipelined confirms, delete them, commit.", peerMessages, peerSlowly),
	limit: "Relay: RabbitMQ. Others: their waits between messages, which are commits of job states, a confirm for each " +
		"message, or the loop's pauses between reading, publishing and deleting.",
	contestants: []contestant{
		{name: "relay", run: drainPeer(ours, peerMessages, nil)},
		{name: "loop", run: drainPeer(skipLocked, peerMessages, nil)},
		{name: "river", run: drainPeer(riverDefault, peerSlowly, nil)},
		{name: "river, tuned", run: drainPeer(riverTuned, peerMessages, nil)},
		{name: "watermill", run: drainPeer(watermillForwarder, peerSlowly, nil)},
	},
	lines: []line{
		{label: "this relay", contestant: "relay", metric: rate, unit: "msg/s"},
		{label: "this relay", contestant: "relay", metric: rate, unit: "msg/s", against: "loop", least: 1},
		{label: "this relay", contestant: "relay", metric: rate, unit: "msg/s", against: "river", least: 1},
		{label: "this relay", contestant: "relay", metric: rate, unit: "msg/s", against: "river, tuned", least: 1},
		{label: "this relay", contestant: "relay", metric: rate, unit: "msg/s", against: "watermill", least: 1},
		{label: "SKIP LOCKED loop", contestant: "loop", metric: rate, unit: "msg/s"},
		{label: "River, defaults", contestant: "river", metric: rate, unit: "msg/s"},
		{label: "River, tuned", contestant: "river, tuned", metric: rate, unit: "msg/s"},
		{label: "Watermill forwarder", contestant: "watermill", metric: rate, unit: "msg/s"},
	},
}

const peerRate = 200

var peerLatencyRow = row{
	name:  "peer-latency",
	title: "Peers, latency",
	how: fmt.Sprintf("%d transactions a second insert one message each (open loop), timed from the return of the "+
		"commit "+
		"to the confirm. The loop polls every 10 ms. The others are woken or poll as in the row above.", peerRate),
	limit: "Relay: two trips to the disk (claim, queue). Others: polling, and their commits before they publish.",
	contestants: []contestant{
		{name: "relay", run: peerLatency(ours)},
		{name: "loop", run: peerLatency(skipLocked)},
		{name: "river", run: peerLatency(riverDefault)},
		{name: "river, tuned", run: peerLatency(riverTuned)},
		{name: "watermill", run: peerLatency(watermillForwarder)},
	},
	lines: []line{
		{label: "this relay, p50", contestant: "relay", metric: "confirm p50", unit: "ms"},
		{label: "this relay, p99", contestant: "relay", metric: "confirm p99", unit: "ms"},
		{label: "SKIP LOCKED loop, p50", contestant: "loop", metric: "confirm p50", unit: "ms",
			against: "relay", least: 1},
		{label: "SKIP LOCKED loop, p99", contestant: "loop", metric: "confirm p99", unit: "ms", against: "relay"},
		{label: "River, defaults, p50", contestant: "river", metric: "confirm p50", unit: "ms",
			against: "relay", least: 1},
		{label: "River, defaults, p99", contestant: "river", metric: "confirm p99", unit: "ms", against: "relay"},
		{label: "River, tuned, p50", contestant: "river, tuned", metric: "confirm p50", unit: "ms",
			against: "relay", least: 1},
		{label: "River, tuned, p99", contestant: "river, tuned", metric: "confirm p99", unit: "ms", against: "relay"},
		{label: "Watermill forwarder, p50", contestant: "watermill", metric: "confirm p50", unit: "ms",
			against: "relay", least: 1},
		{label: "Watermill forwarder, p99", contestant: "watermill", metric: "confirm p99", unit: "ms",
			against: "relay"},
	},
}

// drainPeer measures a peer on a backlog.
func drainPeer(p peer, n int, disturb disturbance) func(ctx context.Context, b *bench) (measured, error) {
	return func(ctx context.Context, b *bench) (found measured, err error) {
		n := b.some(n)
		fill := func(ctx context.Context, url string) error {
			if err := p.prepare(ctx, url); err != nil {
				return err
			}
			insert, end, err := p.insert(ctx, url)
			if err != nil {
				return err
			}
			defer end()
			return inBatches(n, func(messages []messaging.Message) error { return insert(ctx, messages...) })
		}
		err = b.withDatabase(ctx, fmt.Sprintf("%s with %d messages", p.name, n), fill, func(url string) error {
			if disturb != nil {
				end, err := disturb(ctx, url)
				if err != nil {
					return err
				}
				defer end()
			}
			return b.withQueue(ctx, topology, func() error {
				found, err = countUntil(ctx, n, func(ctx context.Context, done func(n int)) error {
					return p.relay(ctx, b, url, func(string) { done(1) })
				})
				return err
			})
		})
		return found, err
	}
}

// peerLatency measures from the commit to the confirm.
func peerLatency(p peer) func(ctx context.Context, b *bench) (measured, error) {
	return func(ctx context.Context, b *bench) (found measured, err error) {
		err = b.withDatabase(ctx, p.name, p.prepare, func(url string) error {
			return b.withQueue(ctx, topology, func() error {
				insert, end, err := p.insert(ctx, url)
				if err != nil {
					return err
				}
				defer end()
				watch := newStopwatch()
				ctx, cancel := context.WithCancel(ctx)
				group, ctx := errgroup.WithContext(ctx)
				group.Go(func() error { return p.relay(ctx, b, url, watch.stop) })
				watches := map[string]*stopwatch{"confirm": watch}
				found, err = underLoad(ctx, peerRate, watches, func(ctx context.Context) error {
					messages := makeMessages(1)
					err := insert(ctx, messages...)
					watch.start(messages[0].ID.String())
					return err
				})
				cancel()
				if ended := group.Wait(); !errors.Is(ended, context.Canceled) {
					err = errors.Join(err, ended)
				}
				return err
			})
		})
		return found, err
	}
}

// ours is our relay. Like the other peers it runs in the benchmark's process.
var ours = peer{
	name:    "ours",
	prepare: migrated,
	insert: func(ctx context.Context, url string) (insertFunc, func(), error) {
		db, err := postgres.Open(ctx, postgres.Config{URL: url})
		if err != nil {
			return nil, nil, err
		}
		ctx, cancel := context.WithCancel(ctx)
		bell := outbox.NewNotifyBell(url)
		over := make(chan struct{})
		go func() { defer close(over); bell.Run(ctx) }()
		writer := outbox.NewWriter(db, bell, nil)
		insert := func(ctx context.Context, messages ...messaging.Message) error {
			return writer.Transact(ctx, func(tx pgx.Tx) error { return outbox.Insert(ctx, tx, messages...) })
		}
		return insert, func() { cancel(); <-over; db.Close() }, nil
	},
	relay: func(ctx context.Context, b *bench, url string, confirmed func(id string)) error {
		return withPool(ctx, relayPool(url), func(db *pgxpool.Pool) error {
			relay := newRelay(b.flags, db, topology, func(to messaging.Publisher) messaging.Publisher {
				return &watchedPublisher{to, func(m messaging.Message) { confirmed(m.ID.String()) }}
			})
			group, ctx := errgroup.WithContext(ctx)
			group.Go(func() error { return relay.Run(ctx) })
			group.Go(func() error { relay.Listen(ctx, url); return nil })
			return group.Wait()
		})
	},
}

const (
	loopBatch = 500
	loopPause = 10 * time.Millisecond
)

// skipLocked is the loop that everybody writes, written well: batches, pipelined confirms, and rows that are deleted in
// the transaction that locks them.
var skipLocked = peer{
	name: "skip locked",
	prepare: func(ctx context.Context, url string) error {
		return execute(ctx, url, `CREATE TABLE plain_outbox (
			id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, message_id uuid NOT NULL, type text NOT NULL, key text NOT NULL,
			payload bytea NOT NULL, headers jsonb NOT NULL DEFAULT '{}',
			created_at timestamptz NOT NULL DEFAULT clock_timestamp())`)
	},
	insert: func(ctx context.Context, url string) (insertFunc, func(), error) {
		db, err := postgres.Open(ctx, postgres.Config{URL: url})
		if err != nil {
			return nil, nil, err
		}
		return func(ctx context.Context, messages ...messaging.Message) error {
			return pgx.BeginFunc(ctx, db, func(tx pgx.Tx) error {
				batch := &pgx.Batch{}
				for _, m := range messages {
					batch.Queue(`INSERT INTO plain_outbox (message_id, type, key, payload) VALUES ($1, $2, $3, $4)`,
						m.ID, m.Type, m.Key, m.Payload)
				}
				return tx.SendBatch(ctx, batch).Close()
			})
		}, db.Close, nil
	},
	relay: func(ctx context.Context, b *bench, url string, confirmed func(id string)) error {
		to, err := openConfirming(b.AMQPURL)
		if err != nil {
			return err
		}
		defer to.close()
		return withPool(ctx, postgres.Config{URL: url}, func(db *pgxpool.Pool) error {
			for ctx.Err() == nil {
				n, err := loopOnce(ctx, db, to, confirmed)
				if err != nil {
					return err
				}
				if n < loopBatch {
					select {
					case <-ctx.Done():
					case <-time.After(loopPause):
					}
				}
			}
			return ctx.Err()
		})
	},
}

const loopSQL = `
SELECT id, message_id, type, key, payload, created_at FROM plain_outbox
ORDER BY id LIMIT $1 FOR UPDATE SKIP LOCKED`

// loopOnce publishes a batch, and returns the number of its messages.
func loopOnce(ctx context.Context, db *pgxpool.Pool, to *confirming, confirmed func(id string)) (n int, err error) {
	err = pgx.BeginFunc(ctx, db, func(tx pgx.Tx) error {
		rows, err := tx.Query(ctx, loopSQL, loopBatch)
		if err != nil {
			return err
		}
		ids := make([]int64, 0, loopBatch)
		messages, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (m messaging.Message, err error) {
			var id int64
			err = row.Scan(&id, &m.ID, &m.Type, &m.Key, &m.Payload, &m.CreatedAt)
			ids = append(ids, id)
			return m, err
		})
		if err != nil || len(messages) == 0 {
			return err
		}
		if err := to.publishAll(messages, loopBatch); err != nil {
			return err
		}
		for _, m := range messages {
			confirmed(m.ID.String())
		}
		n = len(ids)
		_, err = tx.Exec(ctx, `DELETE FROM plain_outbox WHERE id = ANY ($1)`, ids)
		return err
	})
	return n, err
}
