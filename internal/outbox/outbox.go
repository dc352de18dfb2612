// Package outbox is the Postgres side of sending: it writes messages into the log in the caller's transaction, and its
// relay publishes them in order.
//
// # What it guarantees
//
// A message is in the log if and only if the transaction that inserted it committed, and then it is published at least once,
// or parked in dead_letter with a reason. None is skipped, whatever the order in which transactions commit, and however
// long one stays open; none waits for the transaction of another. The messages of one key are published in the order in which
// their transactions committed: in what the broker receives, the first copy of each stands in that order, across crashes and even
// if two relays run at once. A crash of the relay repeats at most the two pages in flight; a crash of Postgres also what it had
// not yet written to disk about deliveries, which is less than a second's worth.
//
// It does not promise order between keys, nor that a message is published once: copies are for the inbox to absorb. If the broker
// nacks one message and accepts a later one of the same key, the two change places; queues without a length limit, as
// this project declares them, do not do that in normal operation.
//
// # Why nothing is skipped
//
// Transactions commit in another order than the one in which they draw their ids, so "id > the last one I saw" loses what
// commits late. Here the cursor is not a number but a snapshot, the database's own notion of what had committed: two snapshots
// tell exactly which rows became visible in between. Every row stores its transaction's xid. A row is new if its xid is not
// visible in the cursor's snapshot, that is, if it is one of the transactions under way back then (pg_snapshot_xip) or one that
// began later (at or above pg_snapshot_xmax); both are found by index. The rows and the snapshot that becomes the next
// cursor come from one statement, so they cannot disagree. The log is in log.go.
//
// A snapshot means something on one timeline of one cluster only. After a failover or a restore, transactions that a snapshot calls
// visible may never have happened, and their ids be given to others. So the relay stops when the server is not the one that it took its lease
// on, and begins again from the cursor as that server has it. The cursor is in cursor.go.
//
// # Why the order of a key holds
//
// Inserting takes a lock on the key that is held until the commit is visible, and only then draws the row's id. So for two
// transactions on a key, ids are in the order of commits, and a snapshot that shows the second shows the first. Rows are published in
// the order of id, each relay publishing one contiguous run that begins at or before the first message not yet delivered.
//
// # Why a message is never ahead of its transaction
//
// A row may be visible and still vanish in a failover, for as long as the standby has not got it. So the relay claims a page before it
// publishes it: it commits the page's snapshot to its cursor. Postgres' log is sequential, so if that commit is safe, then so is every
// row that the page shows.
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

// NewWriter makes a Writer. The bell is rung after each commit; nil means that the relay finds new messages by polling. A gate may be
// given; nil means that everything is accepted, however long the broker is away.
func NewWriter(db *pgxpool.Pool, bell Bell, gate *Gate) *Writer {
	return &Writer{db: db, bell: bell, gate: gate}
}

// Transact is postgres.Transact, and rings the relay's doorbell after the commit. A process that dies in between costs
// the message up to one poll interval, never the message. It returns ErrBacklogFull, before anything is done, if the
// gate is closed: a call that may be a repeat uses TransactOnce.
//
// Its COMMIT waits for the synchronous standby even if fn only read (postgres.ConfirmReads): a handler may answer "this
// was done before" on the strength of a row, and no failover takes the row back.
func (w *Writer) Transact(ctx context.Context, fn func(tx pgx.Tx) error) error {
	if err := w.gate.Check(); err != nil {
		return err
	}
	return w.transact(ctx, fn)
}

// TransactOnce is Transact for a call that may be a repeat. While the gate is closed it runs repeat instead of fn, in a
// transaction of its own. repeat must write nothing. It looks for what an earlier call has left, and returns true if
// that answers this one; else TransactOnce returns ErrBacklogFull, as Transact does. While the gate is open it does not
// call repeat: fn finds an earlier call by itself.
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
	return w.Transact(ctx, fn) // refuses, unless the gate has opened meanwhile
}

// transact is Transact whatever the gate says.
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
	insertOneSQL = `INSERT INTO outbox_message (type, key, payload, headers, id, made_at, checked) VALUES ($1, $2, $3, $4, $5, $6, true)`
	// callOneSQL does the same, and checks once more, where insertOneSQL would be planned each time.
	callOneSQL = `SELECT outbox_insert($1::text, $2::text, $3::bytea, $4::jsonb, $5::uuid)`
)

// Insert writes messages into the log, in their order, as part of tx. The trace of ctx travels with them.
// It returns an error that wraps messaging.ErrInvalid, before anything is written, if one of them could never be
// published, or two of them have one ID. Across calls nobody looks: two messages with one ID are one message, and
// consumers apply the first that comes.
//
// In a transaction of Transact or of postgres.Transact they are written at its end, together with COMMIT, all in one
// call and with no round trip of their own; until then they must not be changed. A savepoint of tx.Begin takes them
// with it when it is rolled back; one that is made by a statement SAVEPOINT is not known here, and does not. In any
// other transaction they are written at once. A transaction or savepoint that has ended returns pgx.ErrTxClosed.
//
// It locks the messages' keys until the transaction ends; each key takes a place in Postgres' lock table, so tens of thousands of keys in one
// transaction may fail for want of shared memory. A transaction that has written at once more than once, with different keys, can deadlock with
// another that did so the other way round.
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

// traced returns valid messages with the trace of ctx. No two of them have one ID.
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

// distinct refuses two messages with one ID: consumers would take the second for a copy of the first.
func distinct(messages []messaging.Message) error {
	if len(messages) < 2 {
		return nil
	}
	seen := make(map[uuid.UUID]struct{}, len(messages))
	for _, m := range messages {
		if _, again := seen[m.ID]; again {
			return fmt.Errorf("%w: two messages have the id %s", messaging.ErrInvalid, m.ID)
		}
		seen[m.ID] = struct{}{}
	}
	return nil
}

var atCommit = postgres.Deferred[messaging.Message]{Queue: func(conn *pgx.Conn, batch *pgx.Batch, messages []messaging.Message) {
	sql, args := statement(conn, messages)
	batch.Queue(sql, args...)
}}

// statement writes messages. One message is by far the most frequent case, and arrays of one would cost both sides more than the row does.
func statement(conn *pgx.Conn, messages []messaging.Message) (sql string, args []any) {
	if len(messages) > 1 {
		return insertSQL, columnsOf(messages)
	}
	m := messages[0]
	// Not the ID as it is: pgx would take what uuid.UUID says to database/sql, a text, and parse it again.
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
