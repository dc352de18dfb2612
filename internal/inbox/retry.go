package inbox

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"sync"
	"time"

	"example.com/orders/internal/deadletter"
	"example.com/orders/internal/messaging"
	"example.com/orders/internal/postgres"
	"github.com/jackc/pgx/v5"
)

// maxCrashes is how many runs of a retried message may have been started and never ended. A handler that takes the process
// with it (out of memory, a fatal error) reaches this number and no other message does: retries run one at a time.
const maxCrashes = 3

// waitingTurn is the error text of a message that has not failed itself.
var waitingTurn = &failure{errors.New("waits its turn")}

const waitingSQL = `SELECT DISTINCT key FROM inbox_retry WHERE consumer = $1 AND key = ANY ($2) AND key <> ''`

// queueWaitingKeys asks which keys have messages in inbox_retry: whatever comes later on those keys queues behind them. A message that is being
// retried at this moment counts, until its effect is committed. What it returns is filled when the batch is closed.
func queueWaitingKeys(batch *pgx.Batch, consumer string, keys []string) (waiting map[string]bool) {
	waiting = map[string]bool{}
	batch.Queue(waitingSQL, consumer, keys).Query(func(rows pgx.Rows) error {
		var key string
		_, err := pgx.ForEachRow(rows, []any{&key}, func() error {
			waiting[key] = true
			return nil
		})
		return err
	})
	return waiting
}

// setAside keeps a message whose handler failed: for a retry, or as a dead letter if no retry can help.
func (b *Inbox) setAside(ctx context.Context, tx pgx.Tx, one *item, cause *failure, done *outcome) error {
	if final(cause) || b.config.MaxAttempts <= 1 {
		letter := b.letter(ctx, one.Delivery, 1, cause)
		done.dead = append(done.dead, letter)
		return b.bury(ctx, tx, letter)
	}
	done.retries++
	return b.queue(ctx, tx, one, cause)
}

const queueSQL = `
INSERT INTO inbox_retry (consumer, message_id, type, key, payload, headers, attempts, starts, due_at, last_error)
VALUES ($1, $2, $3, $4, $5, $6, $7, $7, clock_timestamp() + $8, $9)`

// queue puts a message behind those of its key that wait already.
func (b *Inbox) queue(ctx context.Context, tx pgx.Tx, one *item, cause *failure) error {
	attempts, pause := 0, time.Duration(0)
	if cause != waitingTurn {
		attempts, pause = 1, b.pause(1)
		slog.WarnContext(traceOf(ctx, one.Headers), "message will be retried", "consumer", b.group.name, "message_id", one.ID, "attempt", 1, "error", cause, "retry_in", pause)
	}
	_, err := tx.Exec(ctx, queueSQL, b.group.name, one.ID, one.Type, one.Key, messaging.NotNil(one.Payload), headersOf(one.Delivery), attempts, pause, messaging.CleanText(cause.Error()))
	if err != nil {
		return fmt.Errorf("queue retry: %w", err)
	}
	return nil
}

// Run retries what is due and forgets what is old, until ctx is done. Any number of processes may do so.
func (b *Inbox) Run(ctx context.Context) error {
	var chores sync.WaitGroup
	defer chores.Wait()
	chores.Go(func() { b.sweepNowAndThen(ctx) })
	chores.Go(func() { b.showLife(ctx) })
	defer b.observeRetries(0)()
	return b.WhileResumed(ctx, b.retryDue)
}

// retryDue retries what is due until ctx is done.
func (b *Inbox) retryDue(ctx context.Context) error {
	for ctx.Err() == nil {
		found, err := b.RetryNext(ctx)
		if err != nil && ctx.Err() == nil {
			slog.WarnContext(ctx, "retries interrupted", "consumer", b.group.name, "error", err)
		}
		if found && err == nil {
			continue
		}
		b.wait(ctx)
	}
	return nil
}

// retry is a row of inbox_retry.
type retry struct {
	messaging.Delivery
	seq      int64
	attempts int
	starts   int
}

// The start is counted in a transaction of its own, before the handler runs: if the handler takes the process with it, the count
// stays. Meanwhile the row is not due for as long as a handler may take. Only the first message of a key is a candidate.
const claimSQL = `
UPDATE inbox_retry SET starts = starts + 1, due_at = clock_timestamp() + $2
WHERE seq = (
    SELECT seq FROM inbox_retry AS candidate
    WHERE consumer = $1 AND due_at <= clock_timestamp()
      AND (key = '' OR NOT EXISTS (
          SELECT FROM inbox_retry AS earlier
          WHERE earlier.consumer = candidate.consumer AND earlier.key = candidate.key AND earlier.seq < candidate.seq))
    ORDER BY due_at LIMIT 1
    FOR UPDATE SKIP LOCKED)
RETURNING seq, attempts, starts, message_id, type, key, payload, headers`

// RetryNext runs the handler on the message that has been due longest. It returns false if none is due.
func (b *Inbox) RetryNext(ctx context.Context) (found bool, err error) {
	var one retry
	err = postgres.Transact(ctx, b.db, func(tx pgx.Tx) error {
		return tx.QueryRow(ctx, claimSQL, b.group.name, b.config.claim()).
			Scan(&one.seq, &one.attempts, &one.starts, &one.ID, &one.Type, &one.Key, &one.Payload, &one.Headers)
	})
	if errors.Is(err, pgx.ErrNoRows) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("claim retry: %w", err)
	}
	if one.starts-one.attempts > maxCrashes {
		crashed := fmt.Errorf("the handler was started %d times without coming to an end", one.starts-one.attempts-1)
		return true, b.retryFailed(ctx, one, &failure{&rejection{deadletter.Crashed, crashed}})
	}
	ran := false
	err = postgres.Transact(ctx, b.db, func(tx pgx.Tx) error {
		ran = false
		err := b.remove(ctx, tx, one)
		if err == nil {
			err = b.run(ctx, tx, one.Delivery)
		}
		ran = err == nil
		return err
	})
	err = blameHandlers(err, ran)
	var failed *failure
	if errors.As(err, &failed) {
		err = b.retryFailed(ctx, one, failed)
	} else if err == nil {
		b.meters.applied.Add(ctx, 1, b.meters.group)
		b.progress.note(1, identityOf(one.ID, slotLength))
		b.config.AfterCommit()
	}
	if errors.Is(err, errStolen) {
		return true, nil
	}
	if err != nil {
		b.giveBack(ctx, one)
	}
	return true, err
}

const giveBackSQL = `
UPDATE inbox_retry SET starts = starts - 1, due_at = clock_timestamp()
WHERE seq = $1 AND starts = $2 AND attempts = $3`

// giveBack takes back the start of a run that the database or the end of the process broke off: it was not the message's fault.
// If that fails too, the start stays counted; only several of them in a row do harm.
func (b *Inbox) giveBack(ctx context.Context, one retry) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Second)
	defer cancel()
	_, err := b.db.Exec(ctx, giveBackSQL, one.seq, one.starts, one.attempts)
	if err != nil {
		slog.WarnContext(ctx, "retry not given back", "consumer", b.group.name, "message_id", one.ID, "error", err)
	}
}

// errStolen: the claim ran out, and another process has the row or is done with it.
var errStolen = errors.New("retry was taken over by another process")

// remove deletes the row that was claimed, if the claim still holds.
func (b *Inbox) remove(ctx context.Context, tx pgx.Tx, one retry) error {
	tag, err := tx.Exec(ctx, `DELETE FROM inbox_retry WHERE seq = $1 AND starts = $2 AND attempts = $3`, one.seq, one.starts, one.attempts)
	if err == nil && tag.RowsAffected() == 0 {
		return errStolen
	}
	return err
}

const postponeSQL = `
UPDATE inbox_retry SET attempts = attempts + 1, starts = attempts + 1, due_at = clock_timestamp() + $4, last_error = $5
WHERE seq = $1 AND starts = $2 AND attempts = $3`

// retryFailed puts a message off once more, or gives it up.
func (b *Inbox) retryFailed(ctx context.Context, one retry, cause *failure) error {
	attempts := one.attempts + 1
	if final(cause) || attempts >= b.config.MaxAttempts {
		letter := b.letter(ctx, one.Delivery, attempts, cause)
		err := postgres.Transact(ctx, b.db, func(tx pgx.Tx) error {
			if err := b.remove(ctx, tx, one); err != nil {
				return err
			}
			return b.bury(ctx, tx, letter)
		})
		if err == nil {
			b.meters.dead(ctx, letter)
		}
		return err
	}
	pause := b.pause(attempts)
	slog.WarnContext(traceOf(ctx, one.Headers), "message will be retried", "consumer", b.group.name, "message_id", one.ID, "attempt", attempts, "error", cause, "retry_in", pause)
	err := postgres.Transact(ctx, b.db, func(tx pgx.Tx) error {
		_, err := tx.Exec(ctx, postponeSQL, one.seq, one.starts, one.attempts, pause, messaging.CleanText(cause.Error()))
		return err
	})
	if err == nil {
		b.meters.retries.Add(ctx, 1, b.meters.group)
	}
	return err
}

// pause is exponential, with jitter so that what failed together does not come back together.
func (b *Inbox) pause(attempts int) time.Duration {
	return time.Duration(float64(b.config.pause(attempts)) * (0.75 + rand.Float64()/2))
}

// pause is the pause without jitter.
func (c Config) pause(attempts int) time.Duration {
	if doublings := attempts - 1; c.RetryBase <= c.RetryMax>>doublings { // shifted this way it cannot overflow
		return c.RetryBase << doublings
	}
	return c.RetryMax
}

// LongestRetry is how long a message may go on being tried until it is applied or dead, if its own key keeps it from nothing: every attempt takes the
// whole claim, after as many crashes as are suffered, and every pause is as long as jitter makes it and is noticed one poll late.
func (c Config) LongestRetry() time.Duration {
	c = c.withDefaults()
	longest := c.HandlerTimeout
	for attempt := 1; attempt < c.MaxAttempts; attempt++ {
		longest += c.pause(attempt)*5/4 + (1+maxCrashes)*(c.claim()+c.PollInterval)
	}
	return longest
}

// claim is how long a retry that was claimed is left alone.
func (c Config) claim() time.Duration { return c.HandlerTimeout + 5*time.Second }

// final tells whether no retry can help.
func final(cause *failure) bool {
	var rejected *rejection
	return messaging.IsPermanent(cause) || errors.As(cause, &rejected)
}

// letter makes the dead letter of a message, and logs it.
func (b *Inbox) letter(ctx context.Context, d messaging.Delivery, attempts int, cause *failure) deadletter.Letter {
	var rejected *rejection
	reason := deadletter.Exhausted
	switch {
	case errors.As(cause, &rejected):
		reason = rejected.reason
	case messaging.IsPermanent(cause):
		reason = deadletter.Permanent
	}
	slog.ErrorContext(traceOf(ctx, d.Headers), "message is dead", "consumer", b.group.name, "message_id", d.ID, "type", d.Type, "attempt", attempts, "reason", reason, "error", cause)
	return deadletter.Letter{
		Consumer: b.group.name, MessageID: d.ID, Type: d.Type, Key: d.Key, Payload: d.Payload, Headers: d.Headers,
		Reason: reason, Error: cause.Error(), Attempts: attempts,
	}
}

// bury keeps letters, and tells who has to answer for them.
func (b *Inbox) bury(ctx context.Context, tx pgx.Tx, letters ...deadletter.Letter) error {
	for _, letter := range letters {
		if err := b.config.OnDead(ctx, tx, letter); err != nil {
			return fmt.Errorf("on dead letter: %w", err)
		}
	}
	return deadletter.Insert(ctx, tx, letters...)
}

// headersOf keeps a delivery without headers from becoming NULL.
func headersOf(d messaging.Delivery) map[string]string {
	if d.Headers == nil {
		return map[string]string{}
	}
	return d.Headers
}
