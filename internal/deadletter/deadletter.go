// Package deadletter stores messages that could not be published or applied, with everything needed to inspect them and
// to send them again.
//
// It guarantees that a dead letter keeps its payload byte for byte. It is inserted in the caller's transaction: a
// message leaves the outbox or the inbox in the same commit that stores it here.
package deadletter

import (
	"context"
	"fmt"

	"example.com/shop/internal/messaging"
	"github.com/jackc/pgx/v5"
)

// Reason is why a message is dead, in one word. The dead letter's error text has the details.
type Reason string

// These are the reasons of the relay.
const (
	// Unroutable means that no queue is bound for the message's type.
	Unroutable Reason = "unroutable"
	// Malformed means that the row contains something that must not be published.
	Malformed Reason = "malformed"
	// Refused means that the broker closed the channel because of this message.
	Refused Reason = "refused"
)

// These are the reasons of the inbox.
const (
	// NoID means that the delivery has no message ID, so its copies cannot be recognized.
	NoID Reason = "no_id"
	// OutsideWindow means that the time in the message ID is in the future, or is earlier than the inbox remembers.
	OutsideWindow Reason = "outside_window"
	// UnknownType means that the consumer group has no handler for the type.
	UnknownType Reason = "unknown_type"
	// Undecodable means that the payload is not valid protobuf of its type.
	Undecodable Reason = "undecodable"
	// Permanent means that the handler reported that a retry is useless.
	Permanent Reason = "permanent"
	// Exhausted means that the handler failed as often as it may.
	Exhausted Reason = "exhausted"
	// Crashed means that the handler was started repeatedly and never finished.
	Crashed Reason = "crashed"
	// Undelivered means that the broker stopped delivering the message at its own limit.
	Undelivered Reason = "undelivered"
	// Skipped means that an operator moved the message out of the way of later ones.
	Skipped Reason = "skipped"
)

// Reasons are all reasons.
var Reasons = []Reason{
	Unroutable, Malformed, Refused,
	NoID, OutsideWindow, UnknownType, Undecodable, Permanent, Exhausted, Crashed, Undelivered, Skipped,
}

// Letter is one dead letter.
type Letter struct {
	// Consumer is the consumer group, "" for the relay.
	Consumer  string
	MessageID string
	Type      string
	Key       string
	Payload   []byte
	Headers   map[string]string
	Reason    Reason
	// Error describes what happened, for operators.
	Error string
	// Attempts is how often publishing or handling the message was tried.
	Attempts int
}

const insertSQL = `
INSERT INTO dead_letter (consumer, message_id, type, key, payload, headers, reason, error, attempts)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)`

// Insert stores dead letters as part of tx. It repairs text that Postgres cannot store (NUL, invalid UTF-8), and keeps
// payloads unchanged.
func Insert(ctx context.Context, tx pgx.Tx, letters ...Letter) error {
	batch := &pgx.Batch{}
	for _, letter := range letters {
		headers := make(map[string]string, len(letter.Headers))
		for name, value := range letter.Headers {
			headers[messaging.CleanText(name)] = messaging.CleanText(value)
		}
		batch.Queue(insertSQL, letter.Consumer, messaging.CleanText(letter.MessageID), messaging.CleanText(letter.Type),
			messaging.CleanText(letter.Key), messaging.NotNil(letter.Payload), headers, letter.Reason,
			messaging.CleanText(letter.Error), letter.Attempts)
	}
	if err := tx.SendBatch(ctx, batch).Close(); err != nil {
		return fmt.Errorf("insert dead letter: %w", err)
	}
	return nil
}
