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

// Retention is the time for which the inbox recognizes copies of a message. A later copy becomes a dead letter. So
// Retention must exceed the outbox's retention plus the longest delivery time.
const Retention = (slots-1)*slotLength - slotLength/8

// ring computes the times of the ring of slots. A slot is reused after all others, so it must be emptied before an ID
// of its next turn may arrive. All times are the database's. Margins absorb steps of its clock. Half an hour separates
// window and memory, so a sweep by a clock that is up to half an hour fast does not make a copy look new. Another half
// hour separates memory and skew, for the sweep itself. If the clock is faster than that and is set back after a sweep,
// the inbox has forgotten messages that are inside the window.
type ring struct{ slot time.Duration }

// window is the largest age of a message.
func (r ring) window() time.Duration { return (slots-1)*r.slot - r.slot/8 }

// memory is the time for which the table keeps a record.
func (r ring) memory() time.Duration { return (slots-1)*r.slot - r.slot*5/48 }

// skew is the largest time by which an ID may be in the future: two hours for slots of a day. The outbox inserts
// nothing that is more than ten minutes ahead. The rest allows for a database clock that is set back while messages are
// under way, and for the clocks of foreign publishers.
func (r ring) skew() time.Duration { return r.slot / 12 }

// sweepInterval fits several sweeps into the half hour available each day.
const sweepInterval = 5 * time.Minute

// sweepRegularly deletes old records until ctx is done.
func (b *Inbox) sweepRegularly(ctx context.Context) {
	for ctx.Err() == nil {
		emptied, err := b.sweep(ctx)
		if err != nil && ctx.Err() == nil {
			slog.WarnContext(ctx, "inbox not swept, it grows until the next sweep", "error", err)
		}
		if len(emptied) > 0 {
			slog.InfoContext(ctx, "inbox swept", "slots", emptied)
		}
		if err := b.hasten(ctx); err != nil && ctx.Err() == nil {
			slog.WarnContext(ctx, "retries postponed by a wrong clock not made due", "consumer", b.group.name, "error", err)
		}
		select {
		case <-ctx.Done():
		case <-time.After(sweepInterval + rand.N(time.Minute)):
		}
	}
}

// A due time later than any retry can have was written before the database's clock was set back. A locked row has a
// running handler.
const hastenSQL = `
UPDATE inbox_retry SET due_at = clock_timestamp()
WHERE seq = ANY (ARRAY(
    SELECT seq FROM inbox_retry WHERE consumer = $1 AND due_at > clock_timestamp() + $2 FOR UPDATE SKIP LOCKED))`

// hasten makes retries due that a clock change has postponed. Otherwise their keys would wait until the clock catches
// up.
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
	err = postgres.Transact(ctx, b.db, func(tx pgx.Tx) error { // sets the isolation level
		return tx.QueryRow(ctx, `SELECT inbox_sweep($1)`, b.ring.memory()).Scan(&emptied)
	})
	if err != nil {
		return nil, fmt.Errorf("sweep inbox: %w", err)
	}
	return emptied, nil
}
