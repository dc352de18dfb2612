package inbox

import (
	"context"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"time"

	"example.com/orders/internal/postgres"
	"github.com/jackc/pgx/v5"
)

// Retention is how long the inbox remembers a message. A copy that comes later goes to the dead letters, so it must be longer
// than the outbox keeps messages for replay and the longest that a delivery may take, together.
const Retention = (slots-1)*slotLength - slotLength/24

// ring is the table of slots, seen as time. A slot is used again after all the others, so what it holds must be forgotten before an ID of its
// next turn may come; the margins between window, memory and skew are for clocks that differ.
type ring struct{ slot time.Duration }

// window is how old a message may be, by this process's clock.
func (r ring) window() time.Duration { return (slots-1)*r.slot - r.slot/24 }

// memory is how long the database remembers, by its own clock.
func (r ring) memory() time.Duration { return (slots-1)*r.slot - r.slot/48 }

// skew is how far in the future the time in an ID may lie: the sender's clock against ours. Ten minutes for slots of a day.
func (r ring) skew() time.Duration { return r.slot / 144 }

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
		select {
		case <-ctx.Done():
		case <-time.After(sweepInterval + rand.N(time.Minute)):
		}
	}
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
