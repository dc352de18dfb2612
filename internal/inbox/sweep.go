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

// Retention is how long the inbox remembers a message. A copy that comes later goes to the dead letters, so it must be longer
// than the outbox keeps messages for replay and the longest that a delivery may take, together.
const Retention = (slots-1)*slotLength - slotLength/8

// ring is the table of slots, seen as time. A slot is used again after all the others, so what it holds must be
// forgotten before an ID of its next turn may come. All times are the database's, and the margins are for steps of its
// clock: half an hour between window and memory, so that a message is not taken for new after a sweep by a clock that
// was up to that much fast; and as much between memory and skew, to sweep in. A clock that is fast by more, and set
// back after a sweep, has forgotten what is within the window again.
type ring struct{ slot time.Duration }

// window is how old a message may be.
func (r ring) window() time.Duration { return (slots-1)*r.slot - r.slot/8 }

// memory is how long the database remembers.
func (r ring) memory() time.Duration { return (slots-1)*r.slot - r.slot*5/48 }

// skew is how far in the future the time in an ID may lie: two hours for slots of a day. The outbox inserts nothing
// that is more than ten minutes ahead; what remains is for a clock of the database that is set back while messages are
// under way, and for clocks of other senders.
func (r ring) skew() time.Duration { return r.slot / 12 }

// sweepInterval lets several sweeps fall into the half hour that there is for it each day.
const sweepInterval = 5 * time.Minute

// sweepNowAndThen forgets what is too old, until ctx is done.
func (b *Inbox) sweepNowAndThen(ctx context.Context) {
	for ctx.Err() == nil {
		emptied, err := b.sweep(ctx)
		if err != nil && ctx.Err() == nil {
			slog.WarnContext(ctx, "inbox not swept, it grows until it is", "error", err)
		}
		if len(emptied) > 0 {
			slog.InfoContext(ctx, "inbox swept", "slots", emptied)
		}
		if err := b.hasten(ctx); err != nil && ctx.Err() == nil {
			slog.WarnContext(ctx, "retries that are due too late not looked for", "consumer", b.group.name, "error", err)
		}
		select {
		case <-ctx.Done():
		case <-time.After(sweepInterval + rand.N(time.Minute)):
		}
	}
}

// A time that is further ahead than any retry can be was written before the database's clock was set back. The handler
// of a row that is locked is running.
const hastenSQL = `
UPDATE inbox_retry SET due_at = clock_timestamp()
WHERE seq = ANY (ARRAY(
    SELECT seq FROM inbox_retry WHERE consumer = $1 AND due_at > clock_timestamp() + $2 FOR UPDATE SKIP LOCKED))`

// hasten makes retries due that a clock set back has put off. Otherwise their keys would wait until the clock comes
// there again.
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
	err = postgres.Transact(ctx, b.db, func(tx pgx.Tx) error { // for its isolation level
		return tx.QueryRow(ctx, `SELECT inbox_sweep($1)`, b.ring.memory()).Scan(&emptied)
	})
	if err != nil {
		return nil, fmt.Errorf("sweep inbox: %w", err)
	}
	return emptied, nil
}
