package outbox

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"example.com/shop/internal/messaging"
	"example.com/shop/internal/postgres"
	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
)

const (
	scheduleSQL = `SELECT outbox_schedule($1::uuid[], $2::text[], $3::text[], $4::bytea[], $5::jsonb[], $6, false)`
	latestSQL   = `SELECT outbox_schedule($1::uuid[], $2::text[], $3::text[], $4::bytea[], $5::jsonb[],
    clock_timestamp() + $6::interval, true)`
)

// Schedule writes messages, as part of tx, that enter the log at the time due by the database's clock, or soon after.
// Until then they are stored outside the log. They are published with the random bits of their IDs and the time at
// which they entered the log, because an inbox forgets IDs after days. Operators can trace both IDs.
func Schedule(ctx context.Context, tx pgx.Tx, due time.Time, messages ...messaging.Message) error {
	return schedule(ctx, tx, scheduleSQL, due, messages)
}

// InsertLatest writes messages, as part of tx, of which only the latest of each type and key matters. A message
// replaces an earlier one that still waits. The message committed last is always published. A message waits at most
// the time within, by the database's clock, counted from the first message that it replaces.
func InsertLatest(ctx context.Context, tx pgx.Tx, within time.Duration, messages ...messaging.Message) error {
	for _, message := range messages {
		if message.Key == "" {
			return fmt.Errorf("insert into outbox: %w: message %s has no key, which InsertLatest needs",
				messaging.ErrInvalid, message.ID)
		}
	}
	return schedule(ctx, tx, latestSQL, within, messages)
}

// schedule takes the value of when that sql takes: a time.Time, or a time.Duration from now.
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

// ErrNotScheduled means that a message does not wait for its time: it has entered the log or was never scheduled.
var ErrNotScheduled = errors.New("message is not scheduled")

// Unschedule cancels the message that was scheduled with this ID, as part of tx. It returns ErrNotScheduled if no such
// message waits: it may have been published.
func Unschedule(ctx context.Context, tx pgx.Tx, id uuid.UUID) error {
	var found bool
	if err := tx.QueryRow(ctx, `SELECT outbox_unschedule($1)`, id).Scan(&found); err != nil {
		return fmt.Errorf("unschedule: %w", err)
	}
	if !found {
		return fmt.Errorf("message %s: %w", id, ErrNotScheduled)
	}
	return nil
}

// moveAtOnce is the maximum number of scheduled messages that one transaction moves into the log.
const moveAtOnce = 500

const moveDueSQL = `SELECT moved, next_due_at - clock_timestamp() FROM outbox_move_due($1)`

// moveDue moves scheduled messages into the log when they are due, until ctx is done.
func (r *Relay) moveDue(ctx context.Context) {
	pause := newPause(r.config.PollInterval)
	for ctx.Err() == nil {
		var moved int
		var next *time.Duration
		limited, cancel := context.WithTimeout(ctx, databaseTimeout)
		err := postgres.Transact(limited, r.db, func(tx pgx.Tx) error {
			return tx.QueryRow(limited, moveDueSQL, moveAtOnce).Scan(&moved, &next)
		})
		cancel()
		if err != nil {
			if ctx.Err() == nil {
				retryIn := pause.NextBackOff()
				slog.WarnContext(ctx, "scheduled messages not moved", "error", err, "retry_in", retryIn)
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
			until = min(until, max(*next, 10*time.Millisecond)) // a due row may be locked: do not poll in a tight loop
		}
		if moved < moveAtOnce {
			wait(ctx, nil, until)
		}
	}
}
