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

// waitingTurn is the cause stored with a message that waits behind another of its key.
var waitingTurn = &failure{errors.New("waits its turn")}

// A key with waiting messages has a head, the only one with a due time.
const waitingSQL = `
SELECT key FROM inbox_retry WHERE consumer = $1 AND key = ANY ($2) AND key <> '' AND due_at IS NOT NULL`

// queueWaitingKeys queues a query for the keys that have messages in inbox_retry: later messages of these keys must
// queue behind them. A message that is being retried counts until its effect is committed. Closing the batch fills the
// result.
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

// setAside schedules a retry for a message whose handler failed, or makes it a dead letter if a retry cannot help.
func (b *Inbox) setAside(ctx context.Context, tx pgx.Tx, message *item, cause *failure, done *outcome) error {
	if final(cause) || b.config.MaxAttempts <= 1 {
		letter := b.letter(ctx, message.Delivery, 1, cause)
		done.dead = append(done.dead, letter)
		return b.bury(ctx, tx, letter)
	}
	done.retries++
	done.aside = append(done.aside, aside{message.Delivery, cause})
	return nil
}

// aside is a message to insert into inbox_retry, with the cause.
type aside struct {
	messaging.Delivery
	cause *failure
}

// If the key has a head, a trigger makes the message wait behind it. A message that already waits is not inserted
// again: the inbox may forget a message without a time in its ID while it still waits.
const queueSQL = `
INSERT INTO inbox_retry (consumer, message_id, type, key, payload, headers, attempts, due_at, last_error)
VALUES ($1, $2, $3, $4, $5, $6, $7, clock_timestamp() + $8, $9)
ON CONFLICT (consumer, message_id) WHERE message_id <> '' DO NOTHING`

// queue inserts messages behind the waiting ones of their keys. It must be the last statement of a transaction because
// it locks the keys until the end. It inserts in the order of the keys, so that transactions cannot deadlock.
func (b *Inbox) queue(ctx context.Context, tx pgx.Tx, messages []aside) error {
	if len(messages) == 0 {
		return nil
	}
	slices.SortStableFunc(messages, func(x, y aside) int { return cmp.Compare(x.Key, y.Key) })
	var batch pgx.Batch
	for _, m := range messages {
		attempts, pause := 0, time.Duration(0)
		if m.cause != waitingTurn {
			attempts, pause = 1, b.pause(1)
			b.warn(ctx, m.Delivery, 1, m.cause, pause)
		}
		batch.Queue(queueSQL, b.group.name, m.ID, m.Type, m.Key, messaging.NotNil(m.Payload), headersOf(m.Delivery),
			attempts, pause, messaging.CleanText(m.cause.Error()))
	}
	if err := tx.SendBatch(ctx, &batch).Close(); err != nil {
		return fmt.Errorf("queue retries: %w", err)
	}
	return nil
}

// headersOf returns the headers, and an empty map for none, which would be stored as NULL.
func headersOf(d messaging.Delivery) map[string]string {
	if d.Headers == nil {
		return map[string]string{}
	}
	return d.Headers
}
