// Package inbox is the Postgres side of receiving: it applies each message's effect once, however many copies arrive.
//
// # What it guarantees
//
// For a consumer group and a message ID, the transaction with the handler's effect commits at most once, and exactly
// once unless the message ends in dead_letter. One transaction records the message as taken and either applies it or
// moves it to inbox_retry or dead_letter. The caller acks only after the commit. So a copy finds the record and is
// dropped, and a crash before the commit leaves neither record nor effect.
//
// The messages of one key are applied in the order in which they are handed in. If one fails, those behind it wait in
// inbox_retry until it is applied or dead. Other keys continue.
//
// A bad message does not affect others. A handler's error rolls the batch back and runs it message by message. A
// message whose delivery ended twice without an ack may be killing the process. The inbox moves it to inbox_retry
// without running its handler, and from there runs it alone. It records each run before it starts, and a process that
// survives the run removes the record.
//
// The inbox promises nothing about effects outside this database. It does not apply messages older than its window,
// because they may be copies of forgotten ones: they become dead letters. A database outage costs no attempts.
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

// Config configures an Inbox. The zero value is fit for production.
type Config struct {
	// MaxAttempts is the number of failures after which a message becomes a dead letter. Default 10.
	MaxAttempts int
	// RetryBase is the pause after the first failure. It doubles with each failure, with a quarter of jitter. Default 1 s.
	RetryBase time.Duration
	// RetryMax is the longest pause. Default 10 min. With all defaults the last attempt comes 9 minutes after the first.
	RetryMax time.Duration
	// HandlerTimeout bounds one run of a handler. Default 30 s.
	HandlerTimeout time.Duration
	// PollInterval is the time between two polls for due retries. Default 1 s.
	PollInterval time.Duration
	// AfterCommit is called after each commit that may have inserted into the outbox. Ring the doorbell here.
	AfterCommit func()
	// OnDead is called in the transaction that makes a message a dead letter. On error the message stays where it is and
	// is retried.
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

	progress  progress
	unsettled unsettledRuns
}

func (c Config) withDefaults() Config {
	c.MaxAttempts = cmp.Or(c.MaxAttempts, 10)
	c.RetryBase = cmp.Or(c.RetryBase, time.Second)
	c.RetryMax = cmp.Or(c.RetryMax, 10*time.Minute)
	c.HandlerTimeout = cmp.Or(c.HandlerTimeout, 30*time.Second)
	c.PollInterval = cmp.Or(c.PollInterval, time.Second)
	return c
}

// New returns an Inbox. It starts nothing.
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

// item is a message of a batch with all its copies in the batch.
type item struct {
	messaging.Delivery
	identity
	copies int
	// outside says why the message must not be applied: by the database's clock it is outside the window. take sets it.
	outside error
}

// maxBreaks is the number of deliveries without an ack after which a message goes to inbox_retry unhandled.
const maxBreaks = 2

// Process settles a batch in order. If it returns nil, each delivery is applied, a duplicate, in inbox_retry or in
// dead_letter, and that is committed: the caller may ack all of them. An error means that the database could not
// commit. Hand the batch in again.
func (b *Inbox) Process(ctx context.Context, deliveries []messaging.Delivery) error {
	items, letters := b.admit(ctx, deliveries)
	if err := b.settle(ctx, items); err != nil {
		return err
	}
	if len(letters) == 0 {
		return nil
	}
	// Copies of these cannot be recognized. They come last, so that a batch that is handed in again does not repeat them.
	err := postgres.Transact(ctx, b.db, func(tx pgx.Tx) error { return b.bury(ctx, tx, letters...) })
	if err == nil {
		b.meters.dead(ctx, letters...)
	}
	return err
}

// settle runs the items in one transaction. If one of them fails, it runs each in a transaction of its own.
func (b *Inbox) settle(ctx context.Context, items []*item) error {
	if len(items) == 0 {
		return nil
	}
	err := b.apply(ctx, items, nil)
	var failed *failure
	if !errors.As(err, &failed) {
		return err
	}
	if len(items) == 1 { // it is the one that failed
		return b.apply(ctx, items, failed)
	}
	for _, message := range items {
		alone := []*item{message}
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

// admit merges the copies of each message. It returns dead letters for deliveries that the inbox cannot take.
func (b *Inbox) admit(
	ctx context.Context, deliveries []messaging.Delivery,
) (items []*item, letters []deadletter.Letter) {
	now := time.Now()
	known := make(map[identity]*item, len(deliveries))
	for _, delivery := range deliveries {
		err := wellFormed(delivery) // checked first: a malformed message can never be redriven
		var id identity
		if err == nil {
			id, err = b.ring.identify(delivery.ID, now)
		}
		if err != nil {
			letters = append(letters, b.letter(ctx, delivery, 0, &failure{err}))
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
// *failure. If known is given, it does not run the items but sets them aside because of that failure.
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
		for _, message := range fresh {
			switch {
			case message.outside != nil:
				err = b.refuse(ctx, tx, message, &done)
			case known != nil:
				err = b.setAside(ctx, tx, message, known, &done)
			case waiting[message.Key], message.Count >= maxBreaks:
				done.aside = append(done.aside, aside{message.Delivery, waitingTurn})
				if !waiting[message.Key] {
					done.broken++
				}
				waiting[message.Key] = message.Key != ""
			default:
				err = b.run(ctx, tx, message.Delivery)
				done.applied++
			}
			if err != nil {
				return err
			}
		}
		if err := b.queue(ctx, tx, done.aside); err != nil {
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
		b.progress.note(done.applied, items[len(items)-1].identity)
		b.config.AfterCommit()
	}
	return nil
}

func copiesIn(items []*item) (n int) {
	for _, message := range items {
		n += message.copies
	}
	return n
}

// outcome counts what one transaction did, for the metrics.
type outcome struct {
	applied, copies, retries, broken int
	dead                             []deadletter.Letter
	aside                            []aside
}

// Inserts in the order of the primary key, so that two transactions that take the same messages cannot deadlock. A copy
// of a message that another transaction is applying waits here for that transaction. Only duplicates leave dead row
// versions.
//
// Reads the clock after the insert, when the slot is locked and no sweep can empty it.
const takeSQL = `
INSERT INTO inbox (consumer, slot, message_id, copies)
SELECT $1, slot, message_id, copies
FROM unnest($2::smallint[], $3::uuid[], $4::integer[]) AS batch (slot, message_id, copies)
ORDER BY slot, message_id
ON CONFLICT (slot, consumer, message_id) DO UPDATE SET copies = inbox.copies + excluded.copies
RETURNING message_id, copies, clock_timestamp()`

// take records items as taken. It returns those that were not taken before, in order, and the keys that have messages
// in inbox_retry.
func (b *Inbox) take(
	ctx context.Context, tx pgx.Tx, items []*item,
) (fresh []*item, waiting map[string]bool, err error) {
	type record struct {
		copies int
		at     time.Time
	}
	taken := make(map[uuid.UUID]record, len(items))
	slots, copies, keys := make([]int16, len(items)), make([]int, len(items)), make([]string, len(items))
	ids := make([][16]byte, len(items)) // pgx would format uuid.UUIDs as text and parse them again
	for i, message := range items {
		slots[i], ids[i], copies[i], keys[i] = message.slot, message.id, message.copies, message.Key
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
	fresh = slices.DeleteFunc(slices.Clone(items), func(message *item) bool {
		record := taken[message.id]
		message.outside = b.ring.judge(message.identity, record.at)
		return record.copies != message.copies // the row counts further copies: it existed before
	})
	return fresh, waiting, nil
}
