package postgres

import (
	"context"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// Deferred makes statements of values that were added in the course of a transaction, and sends them together with its COMMIT: they cost no round
// trip of their own, and the locks that they take are held for the shortest time there is.
type Deferred[T any] struct {
	// Queue is called right before COMMIT on conn with all that was added, in its order. It must not fail: what it queues may, and then nothing is
	// committed.
	Queue func(conn *pgx.Conn, batch *pgx.Batch, values []T)
}

// Add adds values to tx, unless tx does not come from Transact, when it returns false. If tx is a savepoint that is rolled back, they are forgotten.
func (d *Deferred[T]) Add(tx pgx.Tx, values ...T) bool {
	t, ok := tx.(*transaction)
	if !ok {
		return false
	}
	for _, value := range values {
		t.deferred = append(t.deferred, deferredValue{d, value})
	}
	return true
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

// transaction is what Transact hands to its function.
type transaction struct {
	pgx.Tx
	outer    *transaction // of a savepoint
	deferred []deferredValue
}

// Begin makes a savepoint.
func (t *transaction) Begin(ctx context.Context) (pgx.Tx, error) {
	savepoint, err := t.Tx.Begin(ctx)
	if err != nil {
		return nil, err
	}
	return &transaction{Tx: savepoint, outer: t}, nil
}

// Commit releases a savepoint, whose deferred values then are those of what is around it; or it ends the transaction.
func (t *transaction) Commit(ctx context.Context) error {
	if t.outer != nil {
		if err := t.Tx.Commit(ctx); err != nil {
			return err
		}
		t.outer.deferred = append(t.outer.deferred, t.deferred...)
		return nil
	}
	if len(t.deferred) == 0 {
		return t.Tx.Commit(ctx)
	}
	begun, first := t.Tx.(*beginning)
	if first {
		_, _ = begun.begun(ctx) // if nothing else has; an error is Commit's below
	}
	conn := t.Conn()
	if conn.PgConn().TxStatus() != 'T' { // failed, and fn swallowed the error: pgx knows what to say
		return t.Tx.Commit(ctx)
	}
	var batch pgx.Batch
	queued := make(map[any]bool, 1)
	for _, one := range t.deferred {
		if !queued[one.of] {
			queued[one.of] = true
			one.of.queue(conn, &batch, t.deferred)
		}
	}
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
