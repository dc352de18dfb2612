package postgres

import (
	"context"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

// joinKey finds the transaction that transactions on a pool are to be part of.
type joinKey struct{ db *pgxpool.Pool }

// Join returns a context in which Transact on db begins no transaction but runs as a part of tx: what it writes is committed with tx or not at
// all, and if it fails, only what it wrote itself is undone. So what stands around a handler can commit something of its own together with the
// handler's effect.
//
// Transact then returns before anything is committed: what is read past its tx does not show what it wrote. A handler must not call Transact from
// several goroutines at once, since they would share a connection.
func Join(ctx context.Context, db *pgxpool.Pool, tx pgx.Tx) context.Context {
	return context.WithValue(ctx, joinKey{db}, tx)
}

func joined(ctx context.Context, db *pgxpool.Pool) pgx.Tx {
	tx, _ := ctx.Value(joinKey{db}).(pgx.Tx)
	return tx
}

// transactWithin is transactOnce within another transaction, by a savepoint.
func transactWithin(ctx context.Context, db *pgxpool.Pool, fn func(tx pgx.Tx) error) error {
	tx, err := joined(ctx, db).Begin(ctx)
	if err != nil {
		return Classify(err)
	}
	released := false
	defer func() {
		if released {
			return
		}
		rollbackCtx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
		defer cancel()
		_ = tx.Rollback(rollbackCtx) // fails only if the connection is gone, and everything with it
	}()
	// What is nested in fn is part of this part.
	if err := fn(tx); err != nil {
		return Classify(err)
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	if tx.Conn().PgConn().TxStatus() == 'E' { // fn swallowed the error of a statement
		return pgx.ErrTxCommitRollback
	}
	if err := tx.Commit(ctx); err != nil {
		return Classify(err)
	}
	released = true
	return nil
}
