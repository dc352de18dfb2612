package inbox

import (
	"context"
	"errors"
	"fmt"

	"example.com/shop/internal/deadletter"
	"example.com/shop/internal/messaging"
	"example.com/shop/internal/postgres"
	"github.com/jackc/pgx/v5"
)

// Drain stores messages that the broker gave up delivering to the group as dead letters. It is the handler of the queue
// that the broker moves such messages to.
func (b *Inbox) Drain(ctx context.Context, deliveries []messaging.Delivery) error {
	letters := make([]deadletter.Letter, 0, len(deliveries))
	for _, d := range deliveries {
		cause := &failure{&rejection{deadletter.Undelivered, fmt.Errorf("the broker gave it up: %s", d.Death)}}
		letters = append(letters, b.deadLetter(ctx, d, int(d.Count), cause))
	}
	err := postgres.Transact(ctx, b.db, func(tx pgx.Tx) error {
		// If the dead letter exists already, it may not have reached the standby yet. The broker forgets the message once
		// it is acked, so wait for the standby.
		postgres.ConfirmReads(tx)
		for _, letter := range letters {
			if err := b.config.OnDead(ctx, tx, letter); err != nil {
				return fmt.Errorf("on dead letter: %w", err)
			}
			if err := deadletter.InsertOnce(ctx, tx, letter); err != nil {
				return err
			}
		}
		return nil
	})
	if err == nil {
		b.meters.dead(ctx, letters...)
	}
	return err
}

// ErrTaken means that the inbox has taken the message before: its effect is committed, it waits in inbox_retry, or it
// is in another dead letter.
var ErrTaken = errors.New("message is taken already")

const requeueTakeSQL = `INSERT INTO inbox (slot, consumer, message_id) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING`

const requeueSQL = `
INSERT INTO inbox_retry (consumer, message_id, type, key, payload, headers, attempts, due_at, last_error)
VALUES ($1, $2, $3, $4, $5, $6, 0, clock_timestamp(), 'redriven')
ON CONFLICT (consumer, message_id) WHERE message_id <> '' DO NOTHING`

// Requeue makes a group try a dead message again, as part of tx, behind the waiting messages of its key. With owned,
// the caller states that the inbox took the message and never applied it. Without owned, Requeue returns ErrTaken if
// the inbox has taken the message.
func Requeue(ctx context.Context, tx pgx.Tx, consumer string, d messaging.Delivery, owned bool) error {
	if d.ID != "" {
		id := identityOf(d.ID, slotLength)
		tag, err := tx.Exec(ctx, requeueTakeSQL, id.slot, consumer, id.id)
		switch {
		case err != nil:
			return fmt.Errorf("take message: %w", err)
		case tag.RowsAffected() == 0 && !owned:
			return ErrTaken
		}
	}
	tag, err := tx.Exec(ctx, requeueSQL, consumer, d.ID, d.Type, d.Key, messaging.NotNil(d.Payload), headersOf(d))
	switch {
	case err != nil:
		return fmt.Errorf("queue retry: %w", err)
	case tag.RowsAffected() == 0:
		return ErrTaken
	}
	return nil
}
