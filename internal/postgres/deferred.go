package postgres

import (
	"cmp"
	"context"
	"errors"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// Deferred makes statements of values that were added in the course of a transaction, and sends them together with its
// COMMIT: they cost no round trip of their own, and the locks that they take are held for the shortest time there is.
type Deferred[T any] struct {
	// Queue is called right before COMMIT on conn with all that was added, in its order. It must not fail: what it
	// queues may, and then nothing is committed.
	Queue func(conn *pgx.Conn, batch *pgx.Batch, values []T)
}

// Add adds values to tx. They share the fate of a statement that tx ran at this moment: a savepoint that is rolled back
// takes them along, one that is released or left open keeps them. Add returns false if tx does not come from Transact,
// and pgx.ErrTxClosed if tx has ended.
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
	for _, one := range all {
		if one.of == d {
			values = append(values, one.value.(T))
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

// pending is what waits for the end of a transaction. There is one for the transaction and all of its savepoints.
type pending struct {
	deferred []deferredValue
	// after are the functions of AfterCommit.
	after []func()
	// confirm is set by ConfirmReads.
	confirm bool
}

// since returns a function that forgets what is added from now on, as ROLLBACK TO SAVEPOINT does with rows.
func (p *pending) since() (forget func()) {
	deferred, after := len(p.deferred), len(p.after)
	return func() {
		// An outer savepoint may have been rolled back before, and then less is left.
		p.deferred = p.deferred[:min(deferred, len(p.deferred))]
		p.after = p.after[:min(after, len(p.after))]
	}
}

// transaction is what Transact hands to its function, or a savepoint in it.
type transaction struct {
	pgx.Tx
	pending *pending
	// Of a savepoint, wherever it was made: the transaction that it is in, and what forgets what was added since.
	root   *transaction
	forget func()
	ended  bool
}

// open tells whether pgx still takes statements for t. It does so for a savepoint within one that has ended.
func (t *transaction) open() bool { return !t.ended && (t.root == nil || !t.root.ended) }

// Begin makes a savepoint.
func (t *transaction) Begin(ctx context.Context) (pgx.Tx, error) {
	savepoint, err := t.savepoint(ctx)
	if err != nil {
		return nil, err // and no transaction that is nil in an interface that is not
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

// Rollback undoes a savepoint, and forgets what was added since it was made; or it ends the transaction.
func (t *transaction) Rollback(ctx context.Context) error {
	err := t.Tx.Rollback(ctx)
	if t.root == nil {
		t.ended = true
		return err
	}
	if errors.Is(err, pgx.ErrTxClosed) {
		return err // as in the deferred Rollback behind a Commit
	}
	t.ended = true
	if err == nil {
		t.forget()
		return nil
	}
	// Nothing was undone, such as when an outer savepoint had taken this one along. An aborted transaction undoes it yet.
	if !t.Conn().IsClosed() && t.Conn().PgConn().TxStatus() != 'E' {
		_ = t.Conn().Close(ctx) // or the transaction could still commit what should have been undone
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
		_, _ = begun.begun(ctx) // if nothing else has; an error is Commit's below
	}
	var batch pgx.Batch
	t.queue(&batch)
	// Without anything to send along, or with a transaction that cannot be committed, pgx knows what to do.
	if batch.Len() == 0 || first && begun.Tx == nil || t.Conn().PgConn().TxStatus() != 'T' {
		return t.Tx.Commit(ctx)
	}
	conn := t.Conn()
	// If a statement fails, Postgres skips what follows it in the batch, and with it COMMIT.
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

// queue queues what is to be sent along with COMMIT.
func (t *transaction) queue(batch *pgx.Batch) {
	all := t.pending.deferred
	queued := make(map[any]bool, 1)
	for _, one := range all {
		if !queued[one.of] {
			queued[one.of] = true
			one.of.queue(t.Conn(), batch, all)
		}
	}
	if t.pending.confirm && len(all) == 0 { // deferred statements write, and COMMIT waits for the standby by itself
		batch.Queue(confirmSQL)
	}
}
