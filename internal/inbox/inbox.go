// Package inbox is the Postgres side of receiving: it applies each message's effect once, however many copies arrive.
//
// # What it guarantees
//
// For a consumer group and a message ID, the transaction with the handler's effect is committed at most once, and exactly once unless the
// message stands in dead_letter. A message is recorded as taken in the same transaction that applies it, or that sets it aside in
// inbox_retry or dead_letter; only when that is committed does the caller ack it. So a copy finds the record and is absorbed, and
// a crash before the commit leaves neither record nor effect.
//
// The messages of one key are applied in the order in which they are handed in, also when one of them fails: those behind it
// wait in inbox_retry until it is applied or dead, while other keys go on.
//
// One bad message harms no other. A handler's error rolls the batch back and runs it message by message. A message
// whose delivery was broken off twice may be killing the process: it is set aside unhandled, and from there it is
// tried alone, each run noted before it begins and taken back by a process that outlives it.
//
// It does not promise anything about effects outside of this database, nor about messages older than the window: those could be copies
// of something forgotten, and go to dead_letter. A database that is away costs no attempts.
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

// Config sets up an Inbox; the zero value is fit for production.
type Config struct {
	// MaxAttempts is how often a handler may fail on a message before it goes to the dead letters. Default 10.
	MaxAttempts int
	// RetryBase is the pause after the first failure; it doubles with each further one, plus or minus a quarter at random. Default 1 s.
	RetryBase time.Duration
	// RetryMax is the longest pause. Default 10 min: with the other defaults the last attempt comes about 9 minutes after the first.
	RetryMax time.Duration
	// HandlerTimeout is how long one run of a handler may take. Default 30 s.
	HandlerTimeout time.Duration
	// PollInterval is how often due retries are looked for. Default 1 s.
	PollInterval time.Duration
	// AfterCommit is called when something was committed that may have inserted into the outbox: the place for the doorbell.
	AfterCommit func()
	// OnDead is called in the transaction in which a message becomes a dead letter, for who has to answer for it. An error keeps it from dying: it
	// is tried again.
	OnDead func(ctx context.Context, tx pgx.Tx, letter deadletter.Letter) error
	// MeterProvider and TracerProvider take metrics and traces. Default: the global ones.
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

	progress progress
	untold   untold
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
	// outside is why the message must not be applied: by the database's clock it is outside of the window. Known when
	// it is taken.
	outside error
}

// maxBreaks is how many deliveries of a message may have ended without an ack before it is set aside unhandled.
const maxBreaks = 2

// Process settles a batch, in its order. When it returns nil, every delivery is applied, known as a duplicate, waiting in inbox_retry,
// or in dead_letter, all of that committed: they may be acked. An error means that the database could not decide; hand the batch in again.
func (b *Inbox) Process(ctx context.Context, deliveries []messaging.Delivery) error {
	items, letters := b.admit(ctx, deliveries)
	if err := b.settle(ctx, items); err != nil {
		return err
	}
	if len(letters) == 0 {
		return nil
	}
	// Last, because nothing tells copies of these: a batch that is handed in again shall not repeat them.
	err := postgres.Transact(ctx, b.db, func(tx pgx.Tx) error { return b.bury(ctx, tx, letters...) })
	if err == nil {
		b.meters.dead(ctx, letters...)
	}
	return err
}

// settle runs items together, and if one of them fails, each by itself.
func (b *Inbox) settle(ctx context.Context, items []*item) error {
	if len(items) == 0 {
		return nil
	}
	err := b.apply(ctx, items, nil)
	var failed *failure
	if !errors.As(err, &failed) {
		return err
	}
	if len(items) == 1 { // it is known which one failed
		return b.apply(ctx, items, failed)
	}
	for _, one := range items {
		alone := []*item{one}
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

// admit joins the copies of each message, and makes dead letters of what has no place in the inbox.
func (b *Inbox) admit(ctx context.Context, deliveries []messaging.Delivery) (items []*item, letters []deadletter.Letter) {
	now := time.Now()
	known := make(map[identity]*item, len(deliveries))
	for _, delivery := range deliveries {
		err := wellFormed(delivery) // at first: what is malformed cannot be redriven, whatever else is wrong with it
		var who identity
		if err == nil {
			who, err = b.ring.identify(delivery.ID, now)
		}
		if err != nil {
			letters = append(letters, b.letter(ctx, delivery, 0, &failure{err}))
			continue
		}
		if first, again := known[who]; again {
			first.copies++
			continue
		}
		known[who] = &item{Delivery: delivery, identity: who, copies: 1}
		items = append(items, known[who])
	}
	return items, letters
}

// apply takes items and runs their handlers in one transaction. It returns a *failure if a handler failed, when nothing is
// written. With known given, the items are not run but set aside for that failure.
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
		for _, one := range fresh {
			switch {
			case one.outside != nil:
				err = b.refuse(ctx, tx, one, &done)
			case known != nil:
				err = b.setAside(ctx, tx, one, known, &done)
			case waiting[one.Key], one.Count >= maxBreaks:
				done.aside = append(done.aside, aside{one.Delivery, waitingTurn})
				if !waiting[one.Key] {
					done.broken++
				}
				waiting[one.Key] = one.Key != ""
			default:
				err = b.run(ctx, tx, one.Delivery)
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
	for _, one := range items {
		n += one.copies
	}
	return n
}

// outcome is what one transaction did, for the metrics.
type outcome struct {
	applied, copies, retries, broken int
	dead                             []deadletter.Letter
	aside                            []aside
}

// In the order of the primary key, so that two transactions that take the same messages cannot wait for each other. A copy that
// another transaction is applying right now waits for its end here. Dead versions of the row are left by duplicates only.
//
// The time is read behind the insert, when the slot is locked and no sweep can empty it any more.
const takeSQL = `
INSERT INTO inbox (consumer, slot, message_id, copies)
SELECT $1, slot, message_id, copies
FROM unnest($2::smallint[], $3::uuid[], $4::integer[]) AS batch (slot, message_id, copies)
ORDER BY slot, message_id
ON CONFLICT (slot, consumer, message_id) DO UPDATE SET copies = inbox.copies + excluded.copies
RETURNING message_id, copies, clock_timestamp()`

// take records items as taken, and returns those that were not taken before, in their order, and which of the keys have messages in inbox_retry.
func (b *Inbox) take(ctx context.Context, tx pgx.Tx, items []*item) (fresh []*item, waiting map[string]bool, err error) {
	type record struct {
		copies int
		at     time.Time
	}
	taken := make(map[uuid.UUID]record, len(items))
	// Not uuid.UUIDs: pgx would take what they say to database/sql, texts, and parse them again.
	slots, ids, copies, keys := make([]int16, len(items)), make([][16]byte, len(items)), make([]int, len(items)), make([]string, len(items))
	for i, one := range items {
		slots[i], ids[i], copies[i], keys[i] = one.slot, one.id, one.copies, one.Key
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
	fresh = slices.DeleteFunc(slices.Clone(items), func(one *item) bool {
		one.outside = b.ring.judge(one.identity, taken[one.id].at)
		return taken[one.id].copies != one.copies // more copies than these: it was there
	})
	return fresh, waiting, nil
}
