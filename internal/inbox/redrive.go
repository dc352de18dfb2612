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

// Drain stores deliveries that the broker gave up as dead letters. It handles the group's dead queue.
func (b *Inbox) Drain(ctx context.Context, deliveries []messaging.Delivery) error {
	letters := make([]deadletter.Letter, 0, len(deliveries))
	for _, d := range deliveries {
		cause := &rejection{deadletter.Undelivered, fmt.Errorf("the broker gave it up: %s", d.Death)}
		letters = append(letters, b.letter(ctx, d, int(d.Count), &failure{cause}))
	}
	err := postgres.Transact(ctx, b.db, func(tx pgx.Tx) error {
		// The broker forgets the message after the ack, so a dead letter that already exists must be on the standby, too.
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

// ErrTaken means that the inbox has already taken the message: it is applied, waits in inbox_retry, or is another dead
// letter.
var ErrTaken = errors.New("message is taken already")

const requeueTakeSQL = `INSERT INTO inbox (slot, consumer, message_id) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING`

const requeueSQL = `
INSERT INTO inbox_retry (consumer, message_id, type, key, payload, headers, attempts, due_at, last_error)
VALUES ($1, $2, $3, $4, $5, $6, 0, clock_timestamp(), 'redriven')
ON CONFLICT (consumer, message_id) WHERE message_id <> '' DO NOTHING`

// Requeue schedules a dead message for another attempt, in tx, behind waiting messages of its key. owned says that the
// inbox had taken the dead message and never applied it. If owned is false and the inbox has taken the message, Requeue
// returns ErrTaken.
func Requeue(ctx context.Context, tx pgx.Tx, consumer string, d messaging.Delivery, owned bool) error {
	if d.ID != "" {
		message := identityOf(d.ID, slotLength)
		tag, err := tx.Exec(ctx, requeueTakeSQL, message.slot, consumer, message.id)
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
