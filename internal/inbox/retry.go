package inbox

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"sync"
	"time"

	"example.com/shop/internal/deadletter"
	"example.com/shop/internal/messaging"
	"example.com/shop/internal/postgres"
	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
)

// maxCrashes is how many runs of a retried message may have ended with their process, without a word. A handler that
// takes the process with it (out of memory, a fatal error) reaches this number, and hardly another message: a process
// has one retry at a time, and takes back what it lives on from.
const maxCrashes = 3

// Run retries what is due and forgets what is old, until ctx is done. Any number of processes may do so.
func (b *Inbox) Run(ctx context.Context) error {
	var chores sync.WaitGroup
	defer chores.Wait()
	chores.Go(func() { b.sweepNowAndThen(ctx) })
	chores.Go(func() { b.heartbeat(ctx) })
	defer b.observeRetries(0)()
	defer b.leave(ctx)
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

// retry is a row of inbox_retry that this process has claimed.
type retry struct {
	messaging.Delivery
	seq      int64
	attempts int
	run      uuid.UUID
	// unended is how many runs there are of which nothing is known, this one included.
	unended int
}

// The run is noted in a transaction of its own, before the handler runs: if the handler takes the process with it,
// the note stays. Meanwhile the row is not due for as long as a handler may take. Heads of keys have a due time, and
// nothing else of a key.
//
// The commit does not wait for the disk or a standby. Losing it takes the claim off a handler whose own connection is
// lost with it; and a crash of Postgres together with a crash of the handler goes unseen once.
const claimSQL = `
WITH hasty AS MATERIALIZED (SELECT set_config('synchronous_commit', 'off', true))
UPDATE inbox_retry SET runs = runs || $3::uuid, due_at = clock_timestamp() + $2
FROM hasty
WHERE seq = (
    SELECT seq FROM inbox_retry
    WHERE consumer = $1 AND due_at <= statement_timestamp() -- not clock_timestamp(), which no index can look for
    ORDER BY due_at LIMIT 1
    FOR UPDATE SKIP LOCKED)
RETURNING seq, attempts, cardinality(runs), message_id, type, key, payload, headers`

// RetryNext runs the handler on the message that has been due longest. It returns false if none is due.
func (b *Inbox) RetryNext(ctx context.Context) (found bool, err error) {
	// First, so that this process has one run at most that it has told nothing of, but for those whose row is
	// another's at this moment.
	if err := b.takeBack(ctx); err != nil {
		return false, err
	}
	one, err := b.claim(ctx)
	if errors.Is(err, pgx.ErrNoRows) {
		return false, nil
	}
	if err == nil {
		err = b.retry(ctx, one)
	}
	if err != nil {
		b.disown(ctx, one)
	}
	if errors.Is(err, errStolen) {
		return true, nil
	}
	return err == nil, err
}

// claim takes the message that has been due longest. Its error is pgx.ErrNoRows if there is none. After any other
// error the claim may stand.
func (b *Inbox) claim(ctx context.Context) (one retry, err error) {
	one.run = uuid.New()
	err = postgres.Transact(ctx, b.db, func(tx pgx.Tx) error {
		return tx.QueryRow(ctx, claimSQL, b.group.name, b.config.claim(), one.run).
			Scan(&one.seq, &one.attempts, &one.unended, &one.ID, &one.Type, &one.Key, &one.Payload, &one.Headers)
	})
	if err != nil && !errors.Is(err, pgx.ErrNoRows) {
		err = fmt.Errorf("claim retry: %w", err)
	}
	return one, err
}

// retry runs the handler of a message that is claimed, and settles what came of it. After an error the claim stands,
// unless it is another's.
func (b *Inbox) retry(ctx context.Context, one retry) error {
	if one.unended > maxCrashes {
		crashed := fmt.Errorf("the handler was started %d times without coming to an end", one.unended-1)
		return b.retryFailed(ctx, one, &failure{&rejection{deadletter.Crashed, crashed}})
	}
	ran := false
	err := postgres.Transact(ctx, b.db, func(tx pgx.Tx) error {
		ran = false
		err := b.remove(ctx, tx, one)
		if err == nil {
			err = b.run(context.WithValue(ctx, attemptKey{}, one.attempts+1), tx, one.Delivery)
		}
		ran = err == nil
		return err
	})
	err = blameHandlers(err, ran)
	var failed *failure
	if errors.As(err, &failed) {
		return b.retryFailed(ctx, one, failed)
	}
	if err == nil {
		b.meters.applied.Add(ctx, 1, b.meters.group)
		b.progress.note(1, identityOf(one.ID, slotLength))
		b.config.AfterCommit()
	}
	return err
}

type attemptKey struct{}

// Attempt returns which attempt at its message a handler is, given the handler's context: 1, and one more for each
// run that failed. Runs that were broken off, by the end of the process or since the database was away, do not count.
func Attempt(ctx context.Context) int {
	if attempt, ok := ctx.Value(attemptKey{}).(int); ok {
		return attempt
	}
	return 1
}

// errStolen: the claim ran out, and another process has the row or is done with it.
var errStolen = errors.New("retry was taken over by another process")

// remove deletes the row that was claimed, if the claim still holds.
func (b *Inbox) remove(ctx context.Context, tx pgx.Tx, one retry) error {
	tag, err := tx.Exec(ctx, `DELETE FROM inbox_retry WHERE seq = $1 AND runs[cardinality(runs)] = $2`, one.seq, one.run)
	if err == nil && tag.RowsAffected() == 0 {
		return errStolen
	}
	return err
}

const postponeSQL = `
UPDATE inbox_retry SET attempts = attempts + 1, runs = '{}', due_at = clock_timestamp() + $3, last_error = $4
WHERE seq = $1 AND runs[cardinality(runs)] = $2`

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
	b.warn(ctx, one.Delivery, attempts, cause, pause)
	err := postgres.Transact(ctx, b.db, func(tx pgx.Tx) error {
		tag, err := tx.Exec(ctx, postponeSQL, one.seq, one.run, pause, messaging.CleanText(cause.Error()))
		if err == nil && tag.RowsAffected() == 0 {
			return errStolen
		}
		return err
	})
	if err == nil {
		b.meters.retries.Add(ctx, 1, b.meters.group)
	}
	return err
}

// warn logs a failure that is not the last.
func (b *Inbox) warn(ctx context.Context, d messaging.Delivery, attempt int, cause *failure, pause time.Duration) {
	slog.WarnContext(traceOf(ctx, d.Headers), "message will be retried", "consumer", b.group.name, "message_id", d.ID,
		"attempt", attempt, "error", cause, "retry_in", pause)
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
