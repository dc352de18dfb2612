package deadletter

import (
	"context"
	"fmt"
	"time"

	"example.com/shop/internal/messaging"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

// Resolution is what became of a dead letter.
type Resolution string

const (
	// Redriven means that the message was sent again. If it fails again, it becomes another dead letter.
	Redriven Resolution = "redriven"
	// Discarded means that an operator gave the message up.
	Discarded Resolution = "discarded"
	// Duplicate means that it is a copy of a message whose effect is committed or that waits elsewhere.
	Duplicate Resolution = "duplicate"
	// Reopened records in the audit log that a discard was reverted. No dead letter has it, because it is open again.
	Reopened Resolution = "reopened"
)

// Stored is a dead letter as the table has it.
type Stored struct {
	ID int64
	Letter
	DeadAt time.Time
	// Resolution is "" while the letter is open.
	Resolution Resolution
	ResolvedAt *time.Time
}

// Filter selects dead letters. An empty field selects all.
type Filter struct {
	IDs []int64
	// Consumer is a consumer group, or Relay.
	Consumer             string
	MessageID, Type, Key string
	Reason               Reason
	// Since and Until are times of death.
	Since, Until time.Time
	// Resolved selects resolved dead letters as well as open ones.
	Resolved bool
}

// Relay is the Consumer in a Filter for dead letters of the relay, whose own Consumer is "".
const Relay = "relay"

const columns = `id, consumer, message_id, type, key, payload, headers, reason, error, attempts, dead_at,
	coalesce(resolution, ''), resolved_at`

// chosenSQL is the condition of a Filter; see args.
const chosenSQL = `(cardinality($2::bigint[]) = 0 OR id = ANY ($2))
  AND ($3 = '' OR consumer = CASE $3 WHEN '` + Relay + `' THEN '' ELSE $3 END)
  AND ($4 = '' OR message_id = $4) AND ($5 = '' OR type = $5) AND ($6 = '' OR key = $6) AND ($7 = '' OR reason = $7)
  AND ($8::timestamptz IS NULL OR dead_at >= $8) AND ($9::timestamptz IS NULL OR dead_at < $9)
  AND ($10 OR resolution IS NULL)`

// args returns the arguments of a statement with chosenSQL. The first argument is the statement's own.
func (f Filter) args(first any) []any {
	optional := func(at time.Time) *time.Time {
		if at.IsZero() {
			return nil
		}
		return &at
	}
	return []any{
		first, append([]int64{}, f.IDs...), f.Consumer, f.MessageID, f.Type, f.Key, f.Reason,
		optional(f.Since), optional(f.Until), f.Resolved,
	}
}

// listSQL omits payloads and headers: a hundred payloads may be a hundred megabytes.
const listSQL = `
SELECT id, consumer, message_id, type, key, ''::bytea, '{}'::jsonb, reason, error, attempts, dead_at,
    coalesce(resolution, ''), resolved_at
FROM dead_letter WHERE id > $1 AND ` + chosenSQL + ` ORDER BY id LIMIT $11`

// List returns at most limit dead letters whose ID is above after, in the order of their IDs, without payload and
// headers.
func List(ctx context.Context, db *pgxpool.Pool, f Filter, after int64, limit int) ([]Stored, error) {
	return list(ctx, db, listSQL, append(f.args(after), limit))
}

const newestSQL = `
SELECT id, consumer, message_id, type, key, ''::bytea, '{}'::jsonb, reason, left(error, 500), attempts, dead_at,
    coalesce(resolution, ''), resolved_at
FROM dead_letter WHERE ($1::bigint = 0 OR id < $1) AND ` + chosenSQL + ` ORDER BY id DESC LIMIT $11`

// Newest returns at most limit dead letters whose ID is below before, newest first. If before is 0, it starts with the
// last one. Like List it omits payload and headers, and it returns only the beginning of the error.
func Newest(ctx context.Context, db *pgxpool.Pool, f Filter, before int64, limit int) ([]Stored, error) {
	return list(ctx, db, newestSQL, append(f.args(before), limit))
}

// Get returns a complete dead letter, resolved or not, if there is one with the ID.
func Get(ctx context.Context, db querier, id int64) (letter Stored, found bool, err error) {
	letters, err := list(ctx, db, `SELECT `+columns+` FROM dead_letter WHERE id = $1`, []any{id})
	if err != nil || len(letters) == 0 {
		return Stored{}, false, err
	}
	return letters[0], true, nil
}

// querier is a pool or a transaction.
type querier interface {
	Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error)
}

func list(ctx context.Context, db querier, sql string, args []any) ([]Stored, error) {
	rows, err := db.Query(ctx, sql, args...)
	if err != nil {
		return nil, fmt.Errorf("list dead letters: %w", err)
	}
	letters, err := pgx.CollectRows(rows, scan)
	if err != nil {
		return nil, fmt.Errorf("list dead letters: %w", err)
	}
	return letters, nil
}

const countSQL = `SELECT count(*), coalesce(max(id), 0) FROM dead_letter WHERE id > $1 AND ` + chosenSQL

// Count returns how many dead letters a filter selects, and the highest ID among them, 0 if there are none. A caller
// that works through dead letters stops at that ID: messages that die meanwhile get higher IDs, even if they were
// redriven a moment before.
func Count(ctx context.Context, db *pgxpool.Pool, f Filter) (n, last int64, err error) {
	if err := db.QueryRow(ctx, countSQL, f.args(int64(0))...).Scan(&n, &last); err != nil {
		return 0, 0, fmt.Errorf("count dead letters: %w", err)
	}
	return n, last, nil
}

func scan(row pgx.CollectableRow) (s Stored, err error) {
	err = row.Scan(&s.ID, &s.Consumer, &s.MessageID, &s.Type, &s.Key, &s.Payload, &s.Headers, &s.Reason, &s.Error,
		&s.Attempts, &s.DeadAt, &s.Resolution, &s.ResolvedAt)
	return s, err
}

// Note is who resolves a dead letter, and why. Both are required.
type Note struct {
	Actor, Reason string
}

// Record is an entry of the audit log.
type Record struct {
	Resolution Resolution `json:"resolution"`
	Reason     string     `json:"reason"`
	Actor      string     `json:"actor"`
	Detail     string     `json:"detail"`
	At         time.Time  `json:"at"`
}

// Audit returns what operators did with a dead letter.
func Audit(ctx context.Context, db *pgxpool.Pool, id int64) ([]Record, error) {
	const sql = `SELECT resolution, reason, actor, detail, at FROM dead_letter_audit WHERE letter_id = $1 ORDER BY id`
	rows, err := db.Query(ctx, sql, id)
	if err != nil {
		return nil, fmt.Errorf("read audit log: %w", err)
	}
	return pgx.CollectRows(rows, pgx.RowToStructByPos[Record])
}

// Undelivered dead letters come from the broker, which may deliver one twice. Only one caller at a time checks and
// inserts; 1869968483 is the class of the outbox's advisory locks for maintenance. The check must be a statement of its
// own, because the lock statement's snapshot is older than what the previous holder committed.
const (
	lockUndeliveredSQL = `SELECT pg_advisory_xact_lock(1869968483, 2)`
	knownSQL           = `
SELECT EXISTS (SELECT FROM dead_letter WHERE message_id = $1 AND consumer = $2 AND reason = $3 AND resolution IS NULL)`
)

// InsertOnce is Insert for a dead letter that may arrive several times. While one is open, it ignores further copies.
func InsertOnce(ctx context.Context, tx pgx.Tx, letter Letter) error {
	if letter.MessageID != "" {
		var known bool
		var batch pgx.Batch
		batch.Queue(lockUndeliveredSQL)
		batch.Queue(knownSQL, messaging.CleanText(letter.MessageID), letter.Consumer, letter.Reason).
			QueryRow(func(row pgx.Row) error { return row.Scan(&known) })
		if err := tx.SendBatch(ctx, &batch).Close(); err != nil {
			return fmt.Errorf("look for dead letter: %w", err)
		}
		if known {
			return nil
		}
	}
	return Insert(ctx, tx, letter)
}
