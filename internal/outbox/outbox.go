// Package outbox is the Postgres side of sending. It writes messages to the log in the caller's transaction, and its
// relay publishes them in order.
//
// # What it guarantees
//
// A message is in the log if and only if the transaction that inserted it committed. Every message in the log is
// published at least once, or parked in dead_letter with a reason. No message is skipped, in whatever order
// transactions commit and however long one of them stays open. No message waits for the transaction of another.
//
// Messages with the same key are published in the order in which their transactions committed. The broker may receive
// copies, but it receives the first copy of each message in that order, across crashes and even if two relays run at
// once.
//
// A crash of the relay repeats at most the two pages in flight. A crash of Postgres also repeats the deliveries that
// Postgres had not yet recorded on disk, which is less than a second's worth.
//
// The package promises neither order between keys nor that a message is published only once: the inbox absorbs copies.
// If the broker nacks a message and accepts a later one with the same key, the two swap places. Queues without a length
// limit, which this project declares, do not do that in normal operation.
//
// # Why no message is skipped
//
// Transactions do not commit in the order in which they draw their ids, so "id > the last one I saw" loses rows that
// commit late. Therefore the cursor is not a number but a snapshot: Postgres' own record of which transactions had
// committed. Two snapshots tell exactly which rows became visible between them. Every row stores the xid of its
// transaction. A row is new if its xid is not visible in the cursor's snapshot: its transaction was either in progress
// when the snapshot was taken (pg_snapshot_xip) or began later (at or above pg_snapshot_xmax). An index finds both
// kinds. One statement returns the rows and the snapshot that becomes the next cursor, so the two cannot disagree. See
// log.go.
//
// A snapshot is valid only on one timeline of one cluster. After a failover or a restore, transactions that a snapshot
// calls visible may never have happened, and other transactions may get their ids. So the relay stops when the server
// is not the one on which it took its lease, and starts again from the cursor that this server has. See cursor.go.
//
// # Why the messages of a key stay in order
//
// An insert locks the key before it draws the row's id, and holds the lock until the commit is visible. So if two
// transactions insert messages with the same key, their ids follow the order of their commits, and a snapshot that
// shows the second transaction also shows the first. Each relay publishes rows in the order of their ids, as one
// contiguous run that begins at or before the first undelivered message.
//
// # Why a message is never ahead of its transaction
//
// Until a row has reached the standby, it can be visible and still vanish in a failover. So the relay claims a page
// before it publishes it: it commits the page's snapshot to its cursor. Postgres' write-ahead log is sequential, so
// once that commit is safe, every row of the page is safe too.
package outbox

import (
	"context"
	"fmt"
	"slices"
	"time"

	"example.com/shop/internal/messaging"
	"example.com/shop/internal/postgres"
	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"go.opentelemetry.io/otel/codes"
)

// Writer runs transactions that insert messages.
type Writer struct {
	db   *pgxpool.Pool
	bell Bell
	gate *Gate
}

// NewWriter returns a Writer. It rings the bell after each commit; if bell is nil, the relay finds new messages by
// polling. If gate is nil, the Writer accepts every message, however long the broker is down.
func NewWriter(db *pgxpool.Pool, bell Bell, gate *Gate) *Writer {
	return &Writer{db: db, bell: bell, gate: gate}
}

// Transact is postgres.Transact, and rings the relay's doorbell after the commit. If the process dies in between, the
// message is delayed by up to one poll interval but never lost. If the gate is closed, Transact does nothing and
// returns ErrBacklogFull; use TransactOnce for a call that may be a repeat.
//
// Its COMMIT waits for the synchronous standby even if fn only reads (postgres.ConfirmReads). So a handler may rely on
// a row to answer "this was done before", and no failover undoes that row.
func (w *Writer) Transact(ctx context.Context, fn func(tx pgx.Tx) error) error {
	if err := w.gate.Check(); err != nil {
		return err
	}
	return w.transact(ctx, fn)
}

// TransactOnce is Transact for a call that may be a repeat. While the gate is closed, it runs repeat instead of fn, in
// its own transaction. repeat must write nothing. It looks for the result of an earlier call and returns true if that
// answers this call. If it returns false, TransactOnce returns ErrBacklogFull, as Transact does. While the gate is
// open, TransactOnce does not call repeat, because fn finds an earlier call itself.
func (w *Writer) TransactOnce(
	ctx context.Context, repeat func(tx pgx.Tx) (answered bool, err error), fn func(tx pgx.Tx) error,
) error {
	if !w.gate.closed() {
		return w.Transact(ctx, fn)
	}
	answered := false
	err := w.transact(ctx, func(tx pgx.Tx) (err error) {
		answered, err = repeat(tx)
		return err
	})
	if err != nil || answered {
		return err
	}
	return w.Transact(ctx, fn) // returns ErrBacklogFull unless the gate has opened meanwhile
}

// transact is Transact without the gate.
func (w *Writer) transact(ctx context.Context, fn func(tx pgx.Tx) error) error {
	err := postgres.Transact(ctx, w.db, func(tx pgx.Tx) error {
		postgres.ConfirmReads(tx)
		return fn(tx)
	})
	if err != nil {
		return blameClock(err)
	}
	if w.bell != nil {
		w.bell.Ring()
	}
	return nil
}

const (
	insertSQL    = `SELECT outbox_insert($1::uuid[], $2::text[], $3::text[], $4::bytea[], $5::jsonb[])`
	insertOneSQL = `INSERT INTO outbox_message (type, key, payload, headers, id, made_at, checked)
VALUES ($1, $2, $3, $4, $5, $6, true)`
	// callOneSQL does the same and repeats the checks. It serves connections on which Postgres would plan insertOneSQL
	// for each call.
	callOneSQL = `SELECT outbox_insert($1::text, $2::text, $3::bytea, $4::jsonb, $5::uuid)`
)

// Insert writes messages to the log, in the given order, as part of tx. The trace of ctx travels with them. If a
// message could never be published, or two messages have the same ID, Insert writes nothing and returns an error that
// wraps messaging.ErrInvalid. It does not compare the IDs of different calls: two messages with the same ID are one
// message, and consumers apply the first that arrives.
//
// In a transaction of Transact or postgres.Transact, Insert defers the write: all messages are sent in one call
// together with COMMIT, without an extra round trip. The caller must not change them until then. Rolling back a
// savepoint made by tx.Begin discards the messages inserted since. Insert cannot see a savepoint made by a SAVEPOINT
// statement, so rolling that back does not discard them. In any other transaction Insert writes immediately. If the
// transaction or savepoint has ended, it returns pgx.ErrTxClosed.
//
// The write locks the messages' keys until the transaction ends. Each key takes an entry in Postgres' lock table, so a
// transaction with tens of thousands of keys may fail because it runs out of shared memory. Two transactions that write
// immediately can deadlock if each of them writes more than once and they write different keys in opposite order.
func Insert(ctx context.Context, tx pgx.Tx, messages ...messaging.Message) error {
	if len(messages) == 0 {
		return nil
	}
	ctx, span := startCreate(ctx, messages)
	defer span.End()
	if err := write(ctx, tx, messages); err != nil {
		span.SetStatus(codes.Error, "not inserted")
		return fmt.Errorf("insert into outbox: %w", err)
	}
	return nil
}

// write is Insert without the span.
func write(ctx context.Context, tx pgx.Tx, messages []messaging.Message) error {
	messages, err := traced(ctx, messages)
	if err != nil {
		return err
	}
	if added, err := atCommit.Add(tx, messages...); added || err != nil {
		return err
	}
	sql, args := statement(tx.Conn(), messages)
	_, err = tx.Exec(ctx, sql, args...)
	return err
}

// traced returns a copy of messages that carries the trace of ctx. It returns an error if a message is invalid or two
// messages have the same ID.
func traced(ctx context.Context, messages []messaging.Message) ([]messaging.Message, error) {
	messages = slices.Clone(messages)
	for i := range messages {
		messages[i].Headers = withTrace(ctx, messages[i].Headers)
		if err := messages[i].Validate(); err != nil {
			return nil, err
		}
	}
	return messages, distinct(messages)
}

// distinct returns an error if two messages have the same ID: consumers would take the second for a copy of the first.
func distinct(messages []messaging.Message) error {
	if len(messages) < 2 {
		return nil
	}
	seen := make(map[uuid.UUID]struct{}, len(messages))
	for _, m := range messages {
		if _, duplicate := seen[m.ID]; duplicate {
			return fmt.Errorf("%w: two messages have the id %s", messaging.ErrInvalid, m.ID)
		}
		seen[m.ID] = struct{}{}
	}
	return nil
}

var atCommit = postgres.Deferred[messaging.Message]{
	Queue: func(conn *pgx.Conn, batch *pgx.Batch, messages []messaging.Message) {
		sql, args := statement(conn, messages)
		batch.Queue(sql, args...)
	},
}

// statement returns the statement that writes messages. A single message is by far the most frequent case, and passing
// it in one-element arrays would cost both sides more than the row does.
func statement(conn *pgx.Conn, messages []messaging.Message) (sql string, args []any) {
	if len(messages) > 1 {
		return insertSQL, columnsOf(messages)
	}
	m := messages[0]
	// Convert the ID to bytes: pgx would call uuid.UUID's Value method, which returns text, and parse the text again.
	args = []any{m.Type, m.Key, messaging.NotNil(m.Payload), m.Headers, [16]byte(m.ID)}
	if postgres.Prepares(conn) {
		return insertOneSQL, append(args, time.Unix(m.ID.Time().UnixTime()))
	}
	return callOneSQL, args
}

// columnsOf returns messages as the arrays that the SQL functions take.
func columnsOf(messages []messaging.Message) []any {
	n := len(messages)
	ids, types, keys := make([][16]byte, n), make([]string, n), make([]string, n)
	payloads, headers := make([][]byte, n), make([]map[string]string, n)
	for i, message := range messages {
		ids[i], types[i], keys[i] = message.ID, message.Type, message.Key
		payloads[i], headers[i] = messaging.NotNil(message.Payload), message.Headers
	}
	return []any{ids, types, keys, payloads, headers}
}
