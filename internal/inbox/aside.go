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
var waitingTurn = &failure{errors.New("waiting for its turn")}

// It is enough to look for heads, because every key with waiting messages has one.
const waitingSQL = `
SELECT key FROM inbox_retry WHERE consumer = $1 AND key = ANY ($2) AND key <> '' AND due_at IS NOT NULL`

// queueWaitingKeys adds a query to the batch: which keys have messages in inbox_retry? Later messages of those keys
// must wait behind them. A message that is being retried counts until its effect is committed. The returned map is
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

// setAside prepares a message whose handler failed for a retry, or makes it a dead letter if no retry can help.
func (b *Inbox) setAside(ctx context.Context, tx pgx.Tx, it *item, cause *failure, done *outcome) error {
	if final(cause) || b.config.MaxAttempts <= 1 {
		letter := b.deadLetter(ctx, it.Delivery, 1, cause)
		done.dead = append(done.dead, letter)
		return b.storeDead(ctx, tx, letter)
	}
	done.retries++
	done.queued = append(done.queued, queued{it.Delivery, cause})
	return nil
}

// queued is a message to insert into inbox_retry, and the reason.
type queued struct {
	messaging.Delivery
	cause *failure
}

// If the key has a head, a trigger makes the message wait behind it. A message that waits already is not inserted
// again: if its ID contains no time, the inbox may have forgotten it while it waits.
const queueSQL = `
INSERT INTO inbox_retry (consumer, message_id, type, key, payload, headers, attempts, due_at, last_error)
VALUES ($1, $2, $3, $4, $5, $6, $7, clock_timestamp() + $8, $9)
ON CONFLICT (consumer, message_id) WHERE message_id <> '' DO NOTHING`

// queue inserts messages into inbox_retry, behind the waiting messages of their keys. Call it last in a transaction,
// because it locks the keys until the transaction ends. It locks them in sorted order, so that two transactions cannot
// deadlock.
func (b *Inbox) queue(ctx context.Context, tx pgx.Tx, messages []queued) error {
	if len(messages) == 0 {
		return nil
	}
	slices.SortStableFunc(messages, func(x, y queued) int { return cmp.Compare(x.Key, y.Key) })
	var batch pgx.Batch
	for _, message := range messages {
		attempts, pause := 0, time.Duration(0)
		if message.cause != waitingTurn {
			attempts, pause = 1, b.pause(1)
			b.warn(ctx, message.Delivery, 1, message.cause, pause)
		}
		batch.Queue(queueSQL, b.group.name, message.ID, message.Type, message.Key, messaging.NotNil(message.Payload),
			headersOf(message.Delivery), attempts, pause, messaging.CleanText(message.cause.Error()))
	}
	if err := tx.SendBatch(ctx, &batch).Close(); err != nil {
		return fmt.Errorf("queue retries: %w", err)
	}
	return nil
}

// headersOf returns the headers of a delivery, and an empty map instead of nil, which Postgres would store as NULL.
func headersOf(d messaging.Delivery) map[string]string {
	if d.Headers == nil {
		return map[string]string{}
	}
	return d.Headers
}
