package outbox

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"example.com/shop/internal/messaging"
	"example.com/shop/internal/postgres"
	"github.com/jackc/pgx/v5"
)

const (
	scheduleSQL = `SELECT outbox_schedule($1::uuid[], $2::text[], $3::text[], $4::bytea[], $5::jsonb[], $6, false)`
	latestSQL   = `SELECT outbox_schedule($1::uuid[], $2::text[], $3::text[], $4::bytea[], $5::jsonb[], clock_timestamp() + $6::interval, true)`
)

// Schedule writes messages, as part of tx, that are inserted into the log at the time due by the database's clock, or
// soon after; until then they are kept apart from it. They are published with the random part of their IDs, and the
// time of that moment in it.
func Schedule(ctx context.Context, tx pgx.Tx, due time.Time, messages ...messaging.Message) error {
	return schedule(ctx, tx, scheduleSQL, due, messages)
}

// InsertLatest writes messages, as part of tx, of which only the latest of each type and key matters: within the time
// given, one takes the place of another. What was committed last is always published, and nothing waits longer than
// that time, by the database's clock, after the first.
func InsertLatest(ctx context.Context, tx pgx.Tx, within time.Duration, messages ...messaging.Message) error {
	for _, message := range messages {
		if message.Key == "" {
			return fmt.Errorf("insert into outbox: %w: only the latest of a key can be wanted, and message %s has "+
				"no key", messaging.ErrInvalid, message.ID)
		}
	}
	return schedule(ctx, tx, latestSQL, within, messages)
}

// schedule takes when as sql does: a time.Time or, from now on, a time.Duration.
func schedule(ctx context.Context, tx pgx.Tx, sql string, when any, messages []messaging.Message) error {
	if len(messages) == 0 {
		return nil
	}
	messages, err := traced(ctx, messages)
	if err == nil {
		_, err = tx.Exec(ctx, sql, append(columnsOf(messages), when)...)
	}
	if err != nil {
		return fmt.Errorf("schedule in outbox: %w", err)
	}
	return nil
}

// ErrNotScheduled means that a message is not waiting for its time: it was inserted into the log already, or never
// scheduled.
var ErrNotScheduled = errors.New("message is not scheduled")

// Unschedule takes a scheduled message back, as part of tx.
func Unschedule(ctx context.Context, tx pgx.Tx, message messaging.Message) error {
	var found bool
	if err := tx.QueryRow(ctx, `SELECT outbox_unschedule($1)`, message.ID).Scan(&found); err != nil {
		return fmt.Errorf("unschedule: %w", err)
	}
	if !found {
		return fmt.Errorf("message %s: %w", message.ID, ErrNotScheduled)
	}
	return nil
}

// moveAtOnce is the most scheduled messages that are moved into the log in one transaction.
const moveAtOnce = 500

// moveDue moves scheduled messages into the log when they are due, until ctx is done.
func (r *Relay) moveDue(ctx context.Context) {
	pause := newPause(r.config.PollInterval)
	for ctx.Err() == nil {
		var moved int
		var next *time.Duration
		limited, cancel := context.WithTimeout(ctx, databaseTimeout)
		err := postgres.Transact(limited, r.db, func(tx pgx.Tx) error {
			return tx.QueryRow(limited, `SELECT moved, next_due_at - clock_timestamp() FROM outbox_move_due($1)`,
				moveAtOnce).Scan(&moved, &next)
		})
		cancel()
		if err != nil {
			if ctx.Err() == nil {
				retryIn := pause.NextBackOff()
				slog.WarnContext(ctx, "scheduled messages not looked at", "error", err, "retry_in", retryIn)
				wait(ctx, nil, retryIn)
			}
			continue
		}
		pause.Reset()
		if moved > 0 {
			r.Ring()
		}
		until := r.config.PollInterval
		if next != nil {
			// What is due and locked by somebody is not asked for without a break.
			until = min(until, max(*next, 10*time.Millisecond))
		}
		if moved < moveAtOnce {
			wait(ctx, nil, until)
		}
	}
}
