package inbox

import (
	"context"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"time"

	"example.com/shop/internal/postgres"
	"github.com/jackc/pgx/v5"
)

// Retention is how long the inbox recognizes copies of a message. A copy that arrives later goes to dead_letter. So
// Retention must be longer than the sum of the outbox's retention for replay and the longest time that a delivery may
// take.
const Retention = (slots-1)*slotLength - slotLength/8

// ring describes the slots of the inbox as durations. A slot is reused after all other slots, so its messages must be
// forgotten before an ID of its next turn can arrive. All times are by the database's clock, and the margins allow for
// steps of that clock. Between window and memory there is half an hour: if a clock that is fast by at most that much
// sweeps, no message within the window is taken for a new one. Between memory and skew there is another half hour, for
// the sweep itself. If the clock is fast by more and is set back after a sweep, messages within the window have been
// forgotten.
type ring struct{ slot time.Duration }

// window returns how old a message may be.
func (r ring) window() time.Duration { return (slots-1)*r.slot - r.slot/8 }

// memory returns how long the database keeps the record of a message.
func (r ring) memory() time.Duration { return (slots-1)*r.slot - r.slot*5/48 }

// skew returns how far in the future the time in an ID may be: two hours for slots of a day. The outbox accepts IDs up
// to ten minutes ahead. The rest allows for a database clock that is set back while messages are in flight, and for the
// clocks of other senders.
func (r ring) skew() time.Duration { return r.slot / 12 }

// sweepInterval allows several sweeps in the half hour that is available each day.
const sweepInterval = 5 * time.Minute

// sweepPeriodically forgets old messages, until ctx is done.
func (b *Inbox) sweepPeriodically(ctx context.Context) {
	for ctx.Err() == nil {
		emptied, err := b.sweep(ctx)
		if err != nil && ctx.Err() == nil {
			slog.WarnContext(ctx, "inbox not swept, it grows until the next sweep", "error", err)
		}
		if len(emptied) > 0 {
			slog.InfoContext(ctx, "inbox swept", "slots", emptied)
		}
		if err := b.hasten(ctx); err != nil && ctx.Err() == nil {
			slog.WarnContext(ctx, "retries postponed by a clock step not checked",
				"consumer", b.group.name, "error", err)
		}
		select {
		case <-ctx.Done():
		case <-time.After(sweepInterval + rand.N(time.Minute)):
		}
	}
}

// A due time further ahead than any retry can be was written before the database's clock was set back. Locked rows are
// skipped, because their handlers are running.
const hastenSQL = `
UPDATE inbox_retry SET due_at = clock_timestamp()
WHERE seq = ANY (ARRAY(
    SELECT seq FROM inbox_retry WHERE consumer = $1 AND due_at > clock_timestamp() + $2 FOR UPDATE SKIP LOCKED))`

// hasten makes retries due that were postponed because the clock was set back. Otherwise their keys would wait until
// the clock reaches the stored time.
func (b *Inbox) hasten(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	return postgres.Transact(ctx, b.db, func(tx pgx.Tx) error {
		_, err := tx.Exec(ctx, hastenSQL, b.group.name, max(b.config.RetryMax*5/4, b.config.claim()))
		return err
	})
}

func (b *Inbox) sweep(ctx context.Context) (emptied []int16, err error) {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	err = postgres.Transact(ctx, b.db, func(tx pgx.Tx) error { // Transact sets the isolation level
		return tx.QueryRow(ctx, `SELECT inbox_sweep($1)`, b.ring.memory()).Scan(&emptied)
	})
	if err != nil {
		return nil, fmt.Errorf("sweep inbox: %w", err)
	}
	return emptied, nil
}
