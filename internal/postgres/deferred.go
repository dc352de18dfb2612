package postgres

import (
	"cmp"
	"context"
	"errors"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// Deferred collects values during a transaction, turns them into statements and sends those together with COMMIT. The
// statements cost no extra round trip, and they hold their locks for the shortest possible time.
type Deferred[T any] struct {
	// Queue is called right before COMMIT on conn, with all values in the order in which they were added. It cannot
	// fail, but the statements that it queues can; then nothing is committed.
	Queue func(conn *pgx.Conn, batch *pgx.Batch, values []T)
}

// Add adds values to tx. They behave like a statement that tx runs at this moment: rolling back a savepoint discards
// them, and releasing it or leaving it open keeps them. Add returns false if tx does not come from Transact, and
// pgx.ErrTxClosed if tx has ended.
func (d *Deferred[T]) Add(tx pgx.Tx, values ...T) (bool, error) {
	t, ok := tx.(*transaction)
	if !ok {
		return false, nil
	}
	if !t.open() {
		return false, pgx.ErrTxClosed
	}
	for _, value := range values {
		t.pending.deferred = append(t.pending.deferred, deferredValue{d, value})
	}
	return true, nil
}

func (d *Deferred[T]) queue(conn *pgx.Conn, batch *pgx.Batch, all []deferredValue) {
	values := make([]T, 0, len(all))
	for _, added := range all {
		if added.of == d {
			values = append(values, added.value.(T))
		}
	}
	d.Queue(conn, batch, values)
}

type deferredValue struct {
	of interface {
		queue(conn *pgx.Conn, batch *pgx.Batch, all []deferredValue)
	}
	value any
}

// pending is the work that waits for the end of a transaction. A transaction and all its savepoints share one.
type pending struct {
	deferred []deferredValue
	// after are the functions of AfterCommit.
	after []func()
	// confirm is set by ConfirmReads.
	confirm bool
}

// since returns a function that forgets everything added after this call, as ROLLBACK TO SAVEPOINT does with rows.
func (p *pending) since() (forget func()) {
	deferred, after := len(p.deferred), len(p.after)
	return func() {
		// There may be fewer entries now, because an outer savepoint was rolled back.
		p.deferred = p.deferred[:min(deferred, len(p.deferred))]
		p.after = p.after[:min(after, len(p.after))]
	}
}

// transaction is the transaction that Transact passes to its function, or a savepoint in it.
type transaction struct {
	pgx.Tx
	pending *pending
	// root and forget are set only in a savepoint, however deeply it is nested: root is the transaction that contains it,
	// and forget discards everything added since the savepoint was made.
	root   *transaction
	forget func()
	ended  bool
}

// open reports whether pgx still accepts statements for t. pgx accepts them for a savepoint inside one that has ended.
func (t *transaction) open() bool { return !t.ended && (t.root == nil || !t.root.ended) }

// Begin makes a savepoint.
func (t *transaction) Begin(ctx context.Context) (pgx.Tx, error) {
	savepoint, err := t.savepoint(ctx)
	if err != nil {
		return nil, err // a nil *transaction would make a non-nil interface
	}
	return savepoint, nil
}

func (t *transaction) savepoint(ctx context.Context) (*transaction, error) {
	savepoint, err := t.Tx.Begin(ctx)
	if err != nil {
		return nil, err
	}
	return &transaction{Tx: savepoint, pending: t.pending, root: cmp.Or(t.root, t), forget: t.pending.since()}, nil
}

// Rollback undoes a savepoint and forgets everything added since it was made, or it ends the transaction.
func (t *transaction) Rollback(ctx context.Context) error {
	err := t.Tx.Rollback(ctx)
	if t.root == nil {
		t.ended = true
		return err
	}
	if errors.Is(err, pgx.ErrTxClosed) {
		return err // as in a deferred Rollback after a Commit
	}
	t.ended = true
	if err == nil {
		t.forget()
		return nil
	}
	// Nothing was undone, for example because rolling back an outer savepoint removed this one. An aborted transaction
	// will still undo it.
	if !t.Conn().IsClosed() && t.Conn().PgConn().TxStatus() != 'E' {
		_ = t.Conn().Close(ctx) // otherwise the transaction could commit changes that should have been undone
	}
	return err
}

// Commit releases a savepoint, or ends the transaction.
func (t *transaction) Commit(ctx context.Context) error {
	defer func() { t.ended = true }()
	if t.root != nil {
		return t.Tx.Commit(ctx)
	}
	begun, first := t.Tx.(*beginning)
	if first && len(t.pending.deferred) > 0 {
		_, _ = begun.begun(ctx) // unless a statement has begun it; the Commit below returns the error
	}
	var batch pgx.Batch
	t.queue(&batch)
	// If there is nothing to send with COMMIT, or the transaction cannot be committed, leave it to pgx.
	if batch.Len() == 0 || first && begun.Tx == nil || t.Conn().PgConn().TxStatus() != 'T' {
		return t.Tx.Commit(ctx)
	}
	conn := t.Conn()
	// If a statement fails, Postgres skips the rest of the batch, including COMMIT.
	batch.Queue("commit").Exec(func(tag pgconn.CommandTag) error {
		if tag.String() == "ROLLBACK" {
			return pgx.ErrTxCommitRollback
		}
		return nil
	})
	err := conn.SendBatch(ctx, &batch).Close()
	switch {
	case err != nil && conn.PgConn().TxStatus() == 'E':
		_ = t.Tx.Rollback(ctx) // fails only if the connection is gone, and the transaction with it
	case first:
		begun.ended()
	}
	return err
}

// queue adds the statements that are sent with COMMIT to the batch.
func (t *transaction) queue(batch *pgx.Batch) {
	all := t.pending.deferred
	queued := make(map[any]bool, 1)
	for _, added := range all {
		if !queued[added.of] {
			queued[added.of] = true
			added.of.queue(t.Conn(), batch, all)
		}
	}
	if t.pending.confirm && len(all) == 0 { // deferred statements write, so COMMIT waits for the standby anyway
		batch.Queue(confirmSQL)
	}
}
