// Package deadletter keeps what could not be published or applied, with everything needed to look at it and to send it
// again.
//
// It guarantees that a letter is kept byte for byte in its payload, and in the transaction of the caller: a message
// leaves the outbox's or the inbox's care in the same commit in which it arrives here.
package deadletter

import (
	"context"
	"fmt"

	"example.com/shop/internal/messaging"
	"github.com/jackc/pgx/v5"
)

// Reason says in one word why a message is dead; the letter's error text has the details.
type Reason string

// Of the relay.
const (
	// Unroutable: no queue is bound for the message's type.
	Unroutable Reason = "unroutable"
	// Malformed: the row holds what must not be published.
	Malformed Reason = "malformed"
	// Refused: the broker closed the channel over this message.
	Refused Reason = "refused"
)

// Of the inbox.
const (
	// NoID: the delivery has no message ID, so copies of it cannot be told from news.
	NoID Reason = "no_id"
	// OutsideWindow: the time in the message ID is older than the inbox remembers, or in the future.
	OutsideWindow Reason = "outside_window"
	// UnknownType: the group has no handler for the type.
	UnknownType Reason = "unknown_type"
	// Undecodable: the payload is not valid protobuf of its type.
	Undecodable Reason = "undecodable"
	// Permanent: the handler said that trying again is useless.
	Permanent Reason = "permanent"
	// Exhausted: the handler failed as often as it may.
	Exhausted Reason = "exhausted"
	// Crashed: the handler was started again and again and never came to an end.
	Crashed Reason = "crashed"
	// Undelivered: the broker gave up delivering, after its own limit.
	Undelivered Reason = "undelivered"
	// Skipped: an operator took it out of the way of those behind it.
	Skipped Reason = "skipped"
)

// Reasons are all there are.
var Reasons = []Reason{
	Unroutable, Malformed, Refused, NoID, OutsideWindow, UnknownType, Undecodable, Permanent, Exhausted, Crashed,
	Undelivered, Skipped,
}

// Letter is one dead message.
type Letter struct {
	// Consumer is the consumer group, "" for the relay.
	Consumer  string
	MessageID string
	Type      string
	Key       string
	Payload   []byte
	Headers   map[string]string
	Reason    Reason
	// Error says what happened, for people.
	Error string
	// Attempts is how often it was tried.
	Attempts int
}

const insertSQL = `
INSERT INTO dead_letter (consumer, message_id, type, key, payload, headers, reason, error, attempts)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)`

// Insert keeps letters as part of tx. Text that Postgres cannot store (NUL, broken UTF-8) is mended; payloads are kept
// as they are.
func Insert(ctx context.Context, tx pgx.Tx, letters ...Letter) error {
	batch := &pgx.Batch{}
	for _, letter := range letters {
		headers := make(map[string]string, len(letter.Headers))
		for name, value := range letter.Headers {
			headers[messaging.CleanText(name)] = messaging.CleanText(value)
		}
		batch.Queue(insertSQL, letter.Consumer, messaging.CleanText(letter.MessageID), messaging.CleanText(letter.Type),
			messaging.CleanText(letter.Key),
			messaging.NotNil(letter.Payload), headers, letter.Reason, messaging.CleanText(letter.Error),
			letter.Attempts)
	}
	if err := tx.SendBatch(ctx, batch).Close(); err != nil {
		return fmt.Errorf("insert dead letter: %w", err)
	}
	return nil
}
