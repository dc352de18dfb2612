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

// maxCrashes is how many runs of a retried message may end together with their process. A handler that kills its
// process (out of memory, a fatal error) reaches this number. Other messages rarely do: a process retries one message
// at a time, and undoes the aborted runs that it survives.
const maxCrashes = 3

// Run retries due messages and forgets old ones, until ctx is done. Any number of processes may call it.
func (b *Inbox) Run(ctx context.Context) error {
	var chores sync.WaitGroup
	defer chores.Wait()
	chores.Go(func() { b.sweepPeriodically(ctx) })
	chores.Go(func() { b.heartbeat(ctx) })
	defer b.observeRetries(0)()
	defer b.undoRunsNow(ctx)
	return b.WhileResumed(ctx, b.retryDue)
}

// retryDue retries due messages until ctx is done.
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
	// unended is the number of runs whose outcome is unknown, including this one.
	unended int
}

// The claim records the run in a separate transaction, before the handler runs, so the record remains if the handler
// kills its process. The row is not due again until the claim expires. Among the messages of a key, only the head has a
// due time.
//
// The commit does not wait for the disk or a standby. If it is lost, the handler loses its claim, but its connection is
// lost as well. And if Postgres and the handler's process crash together, that crash is not counted.
const claimSQL = `
WITH async_commit AS MATERIALIZED (SELECT set_config('synchronous_commit', 'off', true))
UPDATE inbox_retry SET runs = runs || $3::uuid, due_at = clock_timestamp() + $2
FROM async_commit
WHERE seq = (
    SELECT seq FROM inbox_retry
    WHERE consumer = $1 AND due_at <= statement_timestamp() -- an index scan cannot use clock_timestamp()
    ORDER BY due_at LIMIT 1
    FOR UPDATE SKIP LOCKED)
RETURNING seq, attempts, cardinality(runs), message_id, type, key, payload, headers`

// RetryNext runs the handler on the message that has been due longest. It returns false if none is due.
func (b *Inbox) RetryNext(ctx context.Context) (found bool, err error) {
	// This comes first, so that this process has at most one aborted run, apart from those whose row is locked by another
	// process right now.
	if err := b.undoRuns(ctx); err != nil {
		return false, err
	}
	r, err := b.claim(ctx)
	if errors.Is(err, pgx.ErrNoRows) {
		return false, nil
	}
	if err == nil {
		err = b.retry(ctx, r)
	}
	if err != nil {
		b.abort(ctx, r)
	}
	if errors.Is(err, errClaimLost) {
		return true, nil
	}
	return err == nil, err
}

// claim claims the message that has been due longest. It returns pgx.ErrNoRows if none is due. After any other error,
// the claim may be in effect.
func (b *Inbox) claim(ctx context.Context) (r retry, err error) {
	r.run = uuid.New()
	err = postgres.Transact(ctx, b.db, func(tx pgx.Tx) error {
		return tx.QueryRow(ctx, claimSQL, b.group.name, b.config.claim(), r.run).
			Scan(&r.seq, &r.attempts, &r.unended, &r.ID, &r.Type, &r.Key, &r.Payload, &r.Headers)
	})
	if err != nil && !errors.Is(err, pgx.ErrNoRows) {
		err = fmt.Errorf("claim retry: %w", err)
	}
	return r, err
}

// retry runs the handler of a claimed message and settles the outcome. After an error the claim remains in effect,
// unless another process has it.
func (b *Inbox) retry(ctx context.Context, r retry) error {
	if r.unended > maxCrashes {
		crashed := fmt.Errorf("the handler was started %d times and never finished", r.unended-1)
		return b.retryFailed(ctx, r, &failure{&rejection{deadletter.Crashed, crashed}})
	}
	ran := false
	err := postgres.Transact(ctx, b.db, func(tx pgx.Tx) error {
		ran = false
		err := b.remove(ctx, tx, r)
		if err == nil {
			err = b.run(context.WithValue(ctx, attemptKey{}, r.attempts+1), tx, r.Delivery)
		}
		ran = err == nil
		return err
	})
	err = blameHandlers(err, ran)
	var failed *failure
	if errors.As(err, &failed) {
		return b.retryFailed(ctx, r, failed)
	}
	if err == nil {
		b.meters.applied.Add(ctx, 1, b.meters.group)
		b.stats.record(1, identityOf(r.ID, slotLength))
		b.config.AfterCommit()
	}
	return err
}

type attemptKey struct{}

// Attempt returns the number of the current attempt at a message, given the handler's context: 1, plus one for each
// failed run. Interrupted runs do not count, whether the process ended or the database was unavailable.
func Attempt(ctx context.Context) int {
	if attempt, ok := ctx.Value(attemptKey{}).(int); ok {
		return attempt
	}
	return 1
}

// errClaimLost means that the claim expired, and that another process has claimed or settled the message.
var errClaimLost = errors.New("retry was taken over by another process")

// remove deletes the claimed row if the claim is still in effect.
func (b *Inbox) remove(ctx context.Context, tx pgx.Tx, r retry) error {
	tag, err := tx.Exec(ctx, `DELETE FROM inbox_retry WHERE seq = $1 AND runs[cardinality(runs)] = $2`, r.seq, r.run)
	if err == nil && tag.RowsAffected() == 0 {
		return errClaimLost
	}
	return err
}

const postponeSQL = `
UPDATE inbox_retry SET attempts = attempts + 1, runs = '{}', due_at = clock_timestamp() + $3, last_error = $4
WHERE seq = $1 AND runs[cardinality(runs)] = $2`

// retryFailed postpones a message again, or makes it a dead letter.
func (b *Inbox) retryFailed(ctx context.Context, r retry, cause *failure) error {
	attempts := r.attempts + 1
	if final(cause) || attempts >= b.config.MaxAttempts {
		letter := b.deadLetter(ctx, r.Delivery, attempts, cause)
		err := postgres.Transact(ctx, b.db, func(tx pgx.Tx) error {
			if err := b.remove(ctx, tx, r); err != nil {
				return err
			}
			return b.storeDead(ctx, tx, letter)
		})
		if err == nil {
			b.meters.dead(ctx, letter)
		}
		return err
	}
	pause := b.pause(attempts)
	b.warn(ctx, r.Delivery, attempts, cause, pause)
	err := postgres.Transact(ctx, b.db, func(tx pgx.Tx) error {
		tag, err := tx.Exec(ctx, postponeSQL, r.seq, r.run, pause, messaging.CleanText(cause.Error()))
		if err == nil && tag.RowsAffected() == 0 {
			return errClaimLost
		}
		return err
	})
	if err == nil {
		b.meters.retries.Add(ctx, 1, b.meters.group)
	}
	return err
}

// warn logs a failure after which the message will be retried.
func (b *Inbox) warn(ctx context.Context, d messaging.Delivery, attempt int, cause *failure, pause time.Duration) {
	slog.WarnContext(traceOf(ctx, d.Headers), "message will be retried", "consumer", b.group.name, "message_id", d.ID,
		"attempt", attempt, "error", cause, "retry_in", pause)
}

// pause returns the pause after so many attempts: exponential, with jitter, so that messages that failed together are
// not retried together.
func (b *Inbox) pause(attempts int) time.Duration {
	return time.Duration(float64(b.config.pause(attempts)) * (0.75 + rand.Float64()/2))
}

// pause returns the pause without jitter.
func (c Config) pause(attempts int) time.Duration {
	if doublings := attempts - 1; c.RetryBase <= c.RetryMax>>doublings { // a right shift cannot overflow
		return c.RetryBase << doublings
	}
	return c.RetryMax
}

// LongestRetry returns the longest time from the first attempt at a message until the message is applied or dead, if it
// never waits behind another message of its key. In the worst case every attempt crashes as often as allowed, every run
// lasts as long as its claim, every pause has the maximal jitter, and every poll is one interval late.
func (c Config) LongestRetry() time.Duration {
	c = c.withDefaults()
	longest := c.HandlerTimeout
	for attempt := 1; attempt < c.MaxAttempts; attempt++ {
		longest += c.pause(attempt)*5/4 + (1+maxCrashes)*(c.claim()+c.PollInterval)
	}
	return longest
}

// claim returns how long a claim lasts.
func (c Config) claim() time.Duration { return c.HandlerTimeout + 5*time.Second }

// final reports whether no retry can help.
func final(cause *failure) bool {
	var rejected *rejection
	return messaging.IsPermanent(cause) || errors.As(cause, &rejected)
}

// deadLetter makes a dead letter of a message, and logs it.
func (b *Inbox) deadLetter(
	ctx context.Context, d messaging.Delivery, attempts int, cause *failure,
) deadletter.Letter {
	var rejected *rejection
	reason := deadletter.Exhausted
	switch {
	case errors.As(cause, &rejected):
		reason = rejected.reason
	case messaging.IsPermanent(cause):
		reason = deadletter.Permanent
	}
	slog.ErrorContext(traceOf(ctx, d.Headers), "message is dead", "consumer", b.group.name, "message_id", d.ID,
		"type", d.Type, "attempt", attempts, "reason", reason, "error", cause)
	return deadletter.Letter{
		Consumer: b.group.name, MessageID: d.ID, Type: d.Type, Key: d.Key, Payload: d.Payload, Headers: d.Headers,
		Reason: reason, Error: cause.Error(), Attempts: attempts,
	}
}

// storeDead stores dead letters, after calling OnDead for each.
func (b *Inbox) storeDead(ctx context.Context, tx pgx.Tx, letters ...deadletter.Letter) error {
	for _, letter := range letters {
		if err := b.config.OnDead(ctx, tx, letter); err != nil {
			return fmt.Errorf("on dead letter: %w", err)
		}
	}
	return deadletter.Insert(ctx, tx, letters...)
}
