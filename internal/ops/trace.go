package ops

import (
	"context"
	"errors"

	"example.com/orders/internal/deadletter"
	"example.com/orders/internal/inbox"
	"example.com/orders/internal/outbox"
	"github.com/google/uuid"
	"github.com/jackc/pgx/v5/pgxpool"
)

// Journey is the way of one message as far as it is known.
type Journey struct {
	// Log is where it stands in the outbox; empty past the retention, or if another service sent it.
	Log []outbox.Entry
	// Groups are the consumer groups that took it.
	Groups []inbox.Passage
	// Letters are its dead letters, resolved ones included.
	Letters []deadletter.Stored
}

// Trace follows a message.
func Trace(ctx context.Context, db *pgxpool.Pool, messageID string) (j Journey, err error) {
	if messageID == "" {
		return j, errors.New("the message ID is empty")
	}
	if id, invalid := uuid.Parse(messageID); invalid == nil {
		if j.Log, err = outbox.Find(ctx, db, id); err != nil {
			return j, err
		}
	}
	if j.Groups, err = inbox.Journey(ctx, db, messageID); err != nil {
		return j, err
	}
	j.Letters, err = deadletter.List(ctx, db, deadletter.Filter{MessageID: messageID, Resolved: true}, 0, 100)
	return j, err
}
