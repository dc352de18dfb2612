package inbox

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"example.com/shop/internal/messaging"
	"github.com/jackc/pgx/v5"
)

// waitingTurn is the error text of a message that has not failed itself.
var waitingTurn = &failure{errors.New("waits its turn")}

// The heads tell: a key whose messages wait has one.
const waitingSQL = `
SELECT key FROM inbox_retry WHERE consumer = $1 AND key = ANY ($2) AND key <> '' AND due_at IS NOT NULL`

// queueWaitingKeys asks which keys have messages in inbox_retry: whatever comes later on those keys queues behind
// them. A message that is being retried at this moment counts, until its effect is committed. What it returns is
// filled when the batch is closed.
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
	done.aside = append(done.aside, aside{one.Delivery, cause})
	return nil
}

// aside is a message that is to be put into inbox_retry, and why.
type aside struct {
	messaging.Delivery
	cause *failure
}

// Behind a head of its key, a trigger makes the message wait for its turn. A message that waits already is not put
// there again: the inbox forgets one without a time in its ID while it may still wait.
const queueSQL = `
INSERT INTO inbox_retry (consumer, message_id, type, key, payload, headers, attempts, due_at, last_error)
VALUES ($1, $2, $3, $4, $5, $6, $7, clock_timestamp() + $8, $9)
ON CONFLICT (consumer, message_id) WHERE message_id <> '' DO NOTHING`

// queue puts messages behind those of their keys that wait already. It is the last thing that a transaction does,
// since the keys are locked then until its end; and in the order of the keys, so that no two transactions wait for
// each other.
func (b *Inbox) queue(ctx context.Context, tx pgx.Tx, messages []aside) error {
	if len(messages) == 0 {
		return nil
	}
	slices.SortStableFunc(messages, func(x, y aside) int { return cmp.Compare(x.Key, y.Key) })
	var batch pgx.Batch
	for _, one := range messages {
		attempts, pause := 0, time.Duration(0)
		if one.cause != waitingTurn {
			attempts, pause = 1, b.pause(1)
			b.warn(ctx, one.Delivery, 1, one.cause, pause)
		}
		batch.Queue(queueSQL, b.group.name, one.ID, one.Type, one.Key, messaging.NotNil(one.Payload), headersOf(one.Delivery),
			attempts, pause, messaging.CleanText(one.cause.Error()))
	}
	if err := tx.SendBatch(ctx, &batch).Close(); err != nil {
		return fmt.Errorf("queue retries: %w", err)
	}
	return nil
}

// headersOf keeps a delivery without headers from becoming NULL.
func headersOf(d messaging.Delivery) map[string]string {
	if d.Headers == nil {
		return map[string]string{}
	}
	return d.Headers
}
