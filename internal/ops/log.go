package ops

import (
	"context"
	"errors"
	"fmt"
	"time"

	"example.com/shop/internal/messaging"
	"example.com/shop/internal/postgres"
	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

// Logged is a message in the outbox.
type Logged struct {
	messaging.Message
	Shard         int16
	TransactionID uint64
	Delivered     bool
}

// Search selects messages of the outbox. Empty fields select all.
type Search struct {
	Type, Key    string
	Since, Until time.Time // times of insertion
}

// searchSQL reads the newest messages of each shard by its primary key, and returns the newest of all. So it reads no
// more rows of a shard than it may return, unless the search selects few of many.
const searchSQL = `
SELECT message.* FROM outbox_cursor AS at, LATERAL (
    SELECT id, message_id, type, key, created_at, at.shard, xid, outbox_delivered(outbox_cursor, xid, id)
    FROM (SELECT shard, id, xid, message_id, type, key, created_at FROM outbox
          WHERE shard = at.shard AND ($1::bigint = 0 OR id < $1) AND ($2 = '' OR type = $2) AND ($3 = '' OR key = $3)
            AND ($4::timestamptz IS NULL OR created_at >= $4) AND ($5::timestamptz IS NULL OR created_at < $5)
          ORDER BY id DESC LIMIT $6) AS found
    JOIN outbox_cursor USING (shard)) AS message
ORDER BY id DESC LIMIT $6`

// searchTimeout limits a search. A search for a rare message would read the whole outbox.
const searchTimeout = 5 * time.Second

// ErrTooSlow means that a search reached its time limit.
var ErrTooSlow = errors.New("the search took too long; give a message ID, or a shorter time")

// SearchLog returns at most limit messages of the outbox without their payloads, newest first. It starts before the
// place before, or at the newest message if before is 0. It also returns the place of the last message, for the next
// page. It returns ErrTooSlow after 5 s.
func SearchLog(
	ctx context.Context, db *pgxpool.Pool, s Search, before int64, limit int,
) (found []Logged, last int64, err error) {
	limited, cancel := context.WithTimeout(ctx, searchTimeout)
	defer cancel()
	rows, err := db.Query(limited, searchSQL, before, s.Type, s.Key, optional(s.Since), optional(s.Until), limit)
	if err == nil {
		found, err = pgx.CollectRows(rows, func(r pgx.CollectableRow) (m Logged, err error) {
			err = r.Scan(&last, &m.ID, &m.Type, &m.Key, &m.CreatedAt, &m.Shard, &m.TransactionID, &m.Delivered)
			return m, err
		})
	}
	switch {
	case err != nil && limited.Err() != nil && ctx.Err() == nil:
		return nil, 0, ErrTooSlow
	case err != nil:
		return nil, 0, fmt.Errorf("search outbox: %w", postgres.Classify(err))
	}
	return found, last, nil
}

// optional returns nil for the zero time, which selects all.
func optional(at time.Time) *time.Time {
	if at.IsZero() {
		return nil
	}
	return &at
}

// findSQL finds a message by the random bits of its ID. The first six bytes are a time, which changes when a scheduled
// message enters the log (outbox_redate).
const findSQL = `
SELECT message_id, type, key, payload, headers, created_at, shard, xid, outbox_delivered(outbox_cursor, xid, id)
FROM outbox JOIN outbox_cursor USING (shard)
WHERE substring(uuid_send(message_id) FROM 7) = substring(uuid_send($1) FROM 7) AND created_at BETWEEN $2 AND $3`

// FindInLog returns the outbox's rows of a message: usually one, and none after the retention. The time in the ID
// limits the search. If the message was scheduled, id may be the ID that it had then; the rows have its published ID.
func FindInLog(ctx context.Context, db *pgxpool.Pool, id uuid.UUID) ([]Logged, error) {
	created := time.Unix(id.Time().UnixTime())
	// Clocks differ by minutes, but a redriven or scheduled message may be inserted much later than its ID says.
	for _, around := range []time.Duration{15 * time.Minute, 100 * 365 * 24 * time.Hour} {
		rows, err := db.Query(ctx, findSQL, id, created.Add(-around), created.Add(around))
		if err != nil {
			return nil, fmt.Errorf("find message: %w", err)
		}
		found, err := pgx.CollectRows(rows, scanLogged)
		if err != nil || len(found) > 0 {
			return found, err
		}
	}
	return nil, nil
}

// Scheduled is a message that waits outside the log for its time.
type Scheduled struct {
	messaging.Message
	DueAt time.Time
}

const scheduledSQL = `
SELECT message_id, type, key, payload, headers, created_at, due_at FROM outbox_scheduled WHERE message_id = $1`

// findScheduled returns a message that waits for its time, or nil.
func findScheduled(ctx context.Context, db *pgxpool.Pool, id uuid.UUID) (*Scheduled, error) {
	var m Scheduled
	var headers messaging.StoredHeaders
	err := db.QueryRow(ctx, scheduledSQL, id).
		Scan(&m.ID, &m.Type, &m.Key, &m.Payload, &headers, &m.CreatedAt, &m.DueAt)
	if errors.Is(err, pgx.ErrNoRows) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("find scheduled message: %w", err)
	}
	m.Headers = headers.Map
	return &m, nil
}

const letterSQL = `
SELECT message_id FROM dead_letter WHERE right(message_id, 22) = right($1, 22) ORDER BY id DESC LIMIT 1`

// letterID returns the ID that the dead letters of a message have, or the given one if it has none. They outlive the
// log. The last 22 characters are the version and the random bits.
func letterID(ctx context.Context, db *pgxpool.Pool, id uuid.UUID) (found string, err error) {
	err = db.QueryRow(ctx, letterSQL, id.String()).Scan(&found)
	if errors.Is(err, pgx.ErrNoRows) {
		return id.String(), nil
	}
	if err != nil {
		return "", fmt.Errorf("find dead letter: %w", err)
	}
	return found, nil
}

func scanLogged(r pgx.CollectableRow) (m Logged, err error) {
	var headers messaging.StoredHeaders
	err = r.Scan(&m.ID, &m.Type, &m.Key, &m.Payload, &headers, &m.CreatedAt, &m.Shard, &m.TransactionID, &m.Delivered)
	m.Headers = headers.Map
	return m, err
}
