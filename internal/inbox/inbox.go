// Package inbox is the Postgres side of receiving: it applies the effect of each message once, however many copies
// arrive.
//
// # What it guarantees
//
// For each consumer group and message ID, the transaction with the handler's effect commits at most once, and exactly
// once unless the message is in dead_letter. The transaction that applies a message also records it as taken, and so
// does the transaction that moves it to inbox_retry or dead_letter. The caller acks the message only after that commit.
// So a copy finds the record and is absorbed, and a crash before the commit leaves neither record nor effect.
//
// The messages of a key are applied in the order in which they arrive, also when one of them fails: the messages behind
// it wait in inbox_retry until it is applied or dead, while other keys continue.
//
// A bad message harms no other message. If a handler fails, the batch is rolled back and runs again message by message.
// A message whose delivery was interrupted twice may be killing the process. It is moved to inbox_retry unhandled, and
// is retried alone: each run is recorded before it begins, and a process that survives an interrupted run removes the
// record.
//
// The package guarantees nothing about effects outside this database. Messages older than the window go to dead_letter,
// because they could be copies of forgotten messages. An unavailable database costs no attempts.
package inbox

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"example.com/shop/internal/deadletter"
	"example.com/shop/internal/dev/failpoint"
	"example.com/shop/internal/messaging"
	"example.com/shop/internal/postgres"
	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/metric"
	"go.opentelemetry.io/otel/trace"
)

// Config configures an Inbox. The zero value is suitable for production.
type Config struct {
	// MaxAttempts is how often a handler may fail on a message before it becomes a dead letter. Default 10.
	MaxAttempts int
	// RetryBase is the pause after the first failure. Each further failure doubles it, plus or minus a random quarter.
	// Default 1 s.
	RetryBase time.Duration
	// RetryMax is the longest pause. Default 10 min: with the other defaults, the last attempt comes about 9 minutes
	// after the first.
	RetryMax time.Duration
	// HandlerTimeout limits one run of a handler. Default 30 s.
	HandlerTimeout time.Duration
	// PollInterval is the interval between polls for due retries. Default 1 s.
	PollInterval time.Duration
	// AfterCommit is called after a commit that may have inserted into the outbox. Ring the doorbell here.
	AfterCommit func()
	// OnDead is called in the transaction in which a message becomes a dead letter, for code that must answer for the
	// message. If it returns an error, the message stays where it was and is tried again.
	OnDead func(ctx context.Context, tx pgx.Tx, letter deadletter.Letter) error
	// MeterProvider and TracerProvider receive metrics and traces. Default: the global providers.
	MeterProvider  metric.MeterProvider
	TracerProvider trace.TracerProvider
}

// Inbox applies messages for one consumer group.
type Inbox struct {
	db     *pgxpool.Pool
	group  *Group
	config Config
	ring   ring
	meters meters
	tracer trace.Tracer

	stats   stats
	aborted abortedRuns
}

func (c Config) withDefaults() Config {
	c.MaxAttempts = cmp.Or(c.MaxAttempts, 10)
	c.RetryBase = cmp.Or(c.RetryBase, time.Second)
	c.RetryMax = cmp.Or(c.RetryMax, 10*time.Minute)
	c.HandlerTimeout = cmp.Or(c.HandlerTimeout, 30*time.Second)
	c.PollInterval = cmp.Or(c.PollInterval, time.Second)
	return c
}

// New makes an Inbox.
func New(db *pgxpool.Pool, group *Group, config Config) *Inbox {
	config = config.withDefaults()
	if config.AfterCommit == nil {
		config.AfterCommit = func() {}
	}
	if config.OnDead == nil {
		config.OnDead = func(context.Context, pgx.Tx, deadletter.Letter) error { return nil }
	}
	if config.MeterProvider == nil {
		config.MeterProvider = otel.GetMeterProvider()
	}
	if config.TracerProvider == nil {
		config.TracerProvider = otel.GetTracerProvider()
	}
	return &Inbox{
		db: db, group: group, config: config, ring: ring{slotLength},
		meters: newMeters(config.MeterProvider, group.name), tracer: config.TracerProvider.Tracer(scope),
	}
}

// item is one message of a batch, with all its copies in the batch.
type item struct {
	messaging.Delivery
	identity
	copies int
	// outside is why the message must not be applied: by the database's clock, it is outside the window. It is set when
	// the message is taken.
	outside error
}

// maxBreaks is how many deliveries of a message may end without an ack before it moves to inbox_retry unhandled.
const maxBreaks = 2

// Process settles a batch, in its order. When it returns nil, every delivery may be acked: it is applied, recognized as
// a duplicate, waiting in inbox_retry or in dead_letter, and all of that is committed. An error means that the database
// could not decide; pass the batch again.
func (b *Inbox) Process(ctx context.Context, deliveries []messaging.Delivery) error {
	items, letters := b.admit(ctx, deliveries)
	if err := b.settle(ctx, items); err != nil {
		return err
	}
	if len(letters) == 0 {
		return nil
	}
	// This comes last, because copies of these messages cannot be recognized: a batch that is passed again must not
	// repeat them.
	err := postgres.Transact(ctx, b.db, func(tx pgx.Tx) error { return b.storeDead(ctx, tx, letters...) })
	if err == nil {
		b.meters.dead(ctx, letters...)
	}
	return err
}

// settle runs items together and, if one of them fails, one by one.
func (b *Inbox) settle(ctx context.Context, items []*item) error {
	if len(items) == 0 {
		return nil
	}
	err := b.apply(ctx, items, nil)
	var failed *failure
	if !errors.As(err, &failed) {
		return err
	}
	if len(items) == 1 { // this is the item that failed
		return b.apply(ctx, items, failed)
	}
	for i := range items {
		alone := items[i : i+1]
		err := b.apply(ctx, alone, nil)
		if errors.As(err, &failed) {
			err = b.apply(ctx, alone, failed)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// admit joins the copies of each message, and makes dead letters of messages that the inbox cannot record.
func (b *Inbox) admit(
	ctx context.Context, deliveries []messaging.Delivery,
) (items []*item, letters []deadletter.Letter) {
	now := time.Now()
	known := make(map[identity]*item, len(deliveries))
	for _, delivery := range deliveries {
		err := wellFormed(delivery) // comes first: malformed messages cannot be redriven, whatever else is wrong
		var id identity
		if err == nil {
			id, err = b.ring.identify(delivery.ID, now)
		}
		if err != nil {
			letters = append(letters, b.deadLetter(ctx, delivery, 0, &failure{err}))
			continue
		}
		if first, again := known[id]; again {
			first.copies++
			continue
		}
		known[id] = &item{Delivery: delivery, identity: id, copies: 1}
		items = append(items, known[id])
	}
	return items, letters
}

// apply takes items and runs their handlers in one transaction. If a handler fails, it writes nothing and returns a
// *failure. If known is not nil, apply does not run the items but sets them aside for that failure.
func (b *Inbox) apply(ctx context.Context, items []*item, known *failure) error {
	var done outcome
	ran := false
	err := postgres.Transact(ctx, b.db, func(tx pgx.Tx) error {
		done, ran = outcome{}, false
		fresh, waiting, err := b.take(ctx, tx, items)
		if err != nil {
			return err
		}
		done.copies = copiesIn(items) - len(fresh)
		failpoint.Hit("consumer.taken")
		for _, it := range fresh {
			switch {
			case it.outside != nil:
				err = b.refuse(ctx, tx, it, &done)
			case known != nil:
				err = b.setAside(ctx, tx, it, known, &done)
			case waiting[it.Key], it.Count >= maxBreaks:
				done.queued = append(done.queued, queued{it.Delivery, waitingTurn})
				if !waiting[it.Key] {
					done.broken++
				}
				waiting[it.Key] = it.Key != "" // a message without a key blocks no other
			default:
				err = b.run(ctx, tx, it.Delivery)
				done.applied++
			}
			if err != nil {
				return err
			}
		}
		if err := b.queue(ctx, tx, done.queued); err != nil {
			return err
		}
		failpoint.Hit("consumer.handled")
		ran = done.applied > 0
		return nil
	})
	if err != nil {
		return blameHandlers(err, ran)
	}
	b.meters.count(ctx, &done)
	if done.applied > 0 {
		b.stats.record(done.applied, items[len(items)-1].identity)
		b.config.AfterCommit()
	}
	return nil
}

func copiesIn(items []*item) (n int) {
	for _, it := range items {
		n += it.copies
	}
	return n
}

// outcome is what one transaction did, for the metrics.
type outcome struct {
	applied, copies, retries, broken int
	dead                             []deadletter.Letter
	queued                           []queued
}

// The statement inserts in the order of the primary key, so that two transactions that take the same messages cannot
// deadlock. If another transaction is applying a copy right now, the statement waits for that transaction to end. Only
// duplicates leave dead row versions.
//
// The time is read after the insert, when the slot is locked and no sweep can truncate it any more.
const takeSQL = `
INSERT INTO inbox (consumer, slot, message_id, copies)
SELECT $1, slot, message_id, copies
FROM unnest($2::smallint[], $3::uuid[], $4::integer[]) AS batch (slot, message_id, copies)
ORDER BY slot, message_id
ON CONFLICT (slot, consumer, message_id) DO UPDATE SET copies = inbox.copies + excluded.copies
RETURNING message_id, copies, clock_timestamp()`

// take records items as taken. It returns the items that were not taken before, in their order, and the keys that have
// messages in inbox_retry.
func (b *Inbox) take(
	ctx context.Context, tx pgx.Tx, items []*item,
) (fresh []*item, waiting map[string]bool, err error) {
	type record struct {
		copies int
		at     time.Time
	}
	taken := make(map[uuid.UUID]record, len(items))
	slots, copies, keys := make([]int16, len(items)), make([]int, len(items)), make([]string, len(items))
	ids := make([][16]byte, len(items)) // not uuid.UUID: pgx would format each as text and parse it again
	for i, it := range items {
		slots[i], ids[i], copies[i], keys[i] = it.slot, it.id, it.copies, it.Key
	}
	var batch pgx.Batch
	batch.Queue(takeSQL, b.group.name, slots, ids, copies).Query(func(rows pgx.Rows) error {
		var id uuid.UUID
		var found record
		_, err := pgx.ForEachRow(rows, []any{&id, &found.copies, &found.at}, func() error {
			taken[id] = found
			return nil
		})
		return err
	})
	waiting = queueWaitingKeys(&batch, b.group.name, keys)
	if err := tx.SendBatch(ctx, &batch).Close(); err != nil {
		return nil, nil, fmt.Errorf("take messages: %w", err)
	}
	fresh = slices.DeleteFunc(slices.Clone(items), func(it *item) bool {
		it.outside = b.ring.judge(it.identity, taken[it.id].at)
		return taken[it.id].copies != it.copies // more copies than in this batch: it was taken before
	})
	return fresh, waiting, nil
}
