package deadletter

import (
	"context"
	"fmt"
	"time"

	"example.com/shop/internal/messaging"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

// Resolution says what became of a letter.
type Resolution string

const (
	// Redriven: the message goes its way again. If it fails again, that is another letter.
	Redriven Resolution = "redriven"
	// Discarded: it is given up.
	Discarded Resolution = "discarded"
	// Duplicate: it is a copy of a message whose effect is committed, or which waits elsewhere.
	Duplicate Resolution = "duplicate"
	// Reopened stands in the audit log for a discard that was taken back. No letter has it: it is open again.
	Reopened Resolution = "reopened"
)

// Stored is a letter as it stands in the table.
type Stored struct {
	ID int64
	Letter
	DeadAt time.Time
	// Resolution is "" while the letter is open.
	Resolution Resolution
	ResolvedAt *time.Time
}

// Filter chooses letters; what is empty chooses all.
type Filter struct {
	IDs []int64
	// Consumer is a consumer group, or Relay.
	Consumer             string
	MessageID, Type, Key string
	Reason               Reason
	// Since and Until are times of death.
	Since, Until time.Time
	// Resolved chooses resolved letters as well as open ones.
	Resolved bool
}

// Relay stands in a Filter for letters of the relay, whose Consumer is "".
const Relay = "relay"

const columns = `id, consumer, message_id, type, key, payload, headers, reason, error, attempts, dead_at, coalesce(resolution, ''), resolved_at`

// chosenSQL is a Filter; see args.
const chosenSQL = `(cardinality($2::bigint[]) = 0 OR id = ANY ($2)) AND ($3 = '' OR consumer = CASE $3 WHEN '` + Relay +
	`' THEN '' ELSE $3 END)
  AND ($4 = '' OR message_id = $4) AND ($5 = '' OR type = $5) AND ($6 = '' OR key = $6) AND ($7 = '' OR reason = $7)
  AND ($8::timestamptz IS NULL OR dead_at >= $8) AND ($9::timestamptz IS NULL OR dead_at < $9) AND ($10 OR resolution IS NULL)`

// args are the arguments of a statement with chosenSQL, the first of which is its own.
func (f Filter) args(first any) []any {
	optional := func(at time.Time) *time.Time {
		if at.IsZero() {
			return nil
		}
		return &at
	}
	return []any{
		first, append([]int64{}, f.IDs...), f.Consumer, f.MessageID, f.Type, f.Key, f.Reason, optional(f.Since),
		optional(f.Until), f.Resolved,
	}
}

// Without what a list has no room for: a hundred payloads may be a hundred megabytes.
const listSQL = `
SELECT id, consumer, message_id, type, key, ''::bytea, '{}'::jsonb, reason, error, attempts, dead_at,
    coalesce(resolution, ''), resolved_at
FROM dead_letter WHERE id > $1 AND ` + chosenSQL + ` ORDER BY id LIMIT $11`

// List returns letters whose ID is above after, in that order, at most limit, and without payload and headers.
func List(ctx context.Context, db *pgxpool.Pool, f Filter, after int64, limit int) ([]Stored, error) {
	return list(ctx, db, listSQL, append(f.args(after), limit))
}

const newestSQL = `
SELECT id, consumer, message_id, type, key, ''::bytea, '{}'::jsonb, reason, left(error, 500), attempts, dead_at,
    coalesce(resolution, ''), resolved_at
FROM dead_letter WHERE ($1::bigint = 0 OR id < $1) AND ` + chosenSQL + ` ORDER BY id DESC LIMIT $11`

// Newest returns letters whose ID is below before, or from the last one on if that is 0, the newest first and at most
// limit: as List does, and with the beginning of the error only.
func Newest(ctx context.Context, db *pgxpool.Pool, f Filter, before int64, limit int) ([]Stored, error) {
	return list(ctx, db, newestSQL, append(f.args(before), limit))
}

// Get returns all of a letter, resolved or not, if there is one with the ID.
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

// Count returns how many letters a filter chooses, and the highest ID among them, 0 if there are none. Whoever works
// through letters stops there: what dies meanwhile gets a higher ID, even if it is a message that was redriven a moment
// before.
func Count(ctx context.Context, db *pgxpool.Pool, f Filter) (n, last int64, err error) {
	if err := db.QueryRow(ctx, countSQL, f.args(int64(0))...).Scan(&n, &last); err != nil {
		return 0, 0, fmt.Errorf("count dead letters: %w", err)
	}
	return n, last, nil
}

func scan(row pgx.CollectableRow) (s Stored, err error) {
	err = row.Scan(&s.ID, &s.Consumer, &s.MessageID, &s.Type, &s.Key, &s.Payload, &s.Headers, &s.Reason, &s.Error,
		&s.Attempts,
		&s.DeadAt, &s.Resolution, &s.ResolvedAt)
	return s, err
}

// Note says who resolves a letter, and why. Both are required.
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

// Audit returns what was done about a letter.
func Audit(ctx context.Context, db *pgxpool.Pool, id int64) ([]Record, error) {
	rows, err := db.Query(ctx,
		`SELECT resolution, reason, actor, detail, at FROM dead_letter_audit WHERE letter_id = $1 ORDER BY id`, id)
	if err != nil {
		return nil, fmt.Errorf("read audit log: %w", err)
	}
	return pgx.CollectRows(rows, pgx.RowToStructByPos[Record])
}

// Undelivered letters come from the broker, which may hand one over twice. One caller at a time looks and inserts;
// 1869968483 is the class of the outbox's locks for chores. To look is a statement of its own: the lock's own
// snapshot is older than what the holder before committed.
const (
	lockUndeliveredSQL = `SELECT pg_advisory_xact_lock(1869968483, 2)`
	knownSQL           = `
SELECT EXISTS (SELECT FROM dead_letter WHERE message_id = $1 AND consumer = $2 AND reason = $3 AND resolution IS NULL)`
)

// InsertOnce is Insert for a letter of which copies may come: while one is open, further ones are absorbed.
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
