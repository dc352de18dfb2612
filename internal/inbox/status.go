package inbox

import (
	"context"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

// MessageStatus is what one consumer group did with a message.
type MessageStatus struct {
	Consumer   string    `json:"consumer"`
	ReceivedAt time.Time `json:"received_at"`
	// Copies is the number of deliveries, including absorbed duplicates.
	Copies int `json:"copies"`
	// Waits reports whether the message is in inbox_retry, either because it failed itself or behind another message of
	// its key; in the second case it has no DueAt. The fields below are zero if it does not wait.
	Waits     bool       `json:"waits"`
	Attempts  int        `json:"attempts"`
	DueAt     *time.Time `json:"due_at,omitempty"`
	LastError string     `json:"last_error,omitempty"`
}

const statusSQL = `
SELECT inbox.consumer, received_at, copies, attempts IS NOT NULL, coalesce(attempts, 0), due_at,
    coalesce(last_error, '')
FROM inbox LEFT JOIN inbox_retry AS retry ON retry.consumer = inbox.consumer AND retry.message_id = $3
WHERE slot = $1 AND inbox.message_id = $2
ORDER BY inbox.consumer`

// StatusesOf returns what each consumer group did with a message. A group that is missing has not taken the message, or
// has forgotten it.
func StatusesOf(ctx context.Context, db *pgxpool.Pool, messageID string) ([]MessageStatus, error) {
	id := identityOf(messageID, slotLength)
	rows, err := db.Query(ctx, statusSQL, id.slot, id.id, messageID)
	if err != nil {
		return nil, fmt.Errorf("read inbox: %w", err)
	}
	return pgx.CollectRows(rows, pgx.RowToStructByPos[MessageStatus])
}

// BlockedKey is a key whose messages wait for its head.
type BlockedKey struct {
	Consumer  string    `json:"consumer"`
	Key       string    `json:"key"`
	Waiting   int       `json:"waiting"`
	Since     time.Time `json:"since"`
	MessageID string    `json:"message_id"` // the first
	Attempts  int       `json:"attempts"`
	DueAt     time.Time `json:"due_at"`
	LastError string    `json:"last_error"`
}

// The heads provide everything except the number of waiting messages. Counting those reads one index entry per message,
// for the returned keys only.
const blockedSQL = `
SELECT head.consumer, head.key, waiting.messages, created_at, message_id, attempts, due_at, last_error
FROM (
    SELECT * FROM inbox_retry WHERE key <> '' AND due_at IS NOT NULL ORDER BY created_at LIMIT $1) AS head
CROSS JOIN LATERAL (
    SELECT count(*) AS messages FROM inbox_retry AS message
    WHERE message.consumer = head.consumer AND message.key = head.key AND message.key <> '') AS waiting
ORDER BY created_at`

// Blocked returns up to most blocked keys of all consumer groups, the longest blocked first.
func Blocked(ctx context.Context, db *pgxpool.Pool, most int) ([]BlockedKey, error) {
	rows, err := db.Query(ctx, blockedSQL, most)
	if err != nil {
		return nil, fmt.Errorf("read retries: %w", err)
	}
	return pgx.CollectRows(rows, pgx.RowToStructByPos[BlockedKey])
}
