package postgres

import (
	"context"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

// joinKey finds the transaction that transactions on a pool are to be part of.
type joinKey struct{ db *pgxpool.Pool }

// Join returns a context in which Transact on db begins no transaction but runs as a part of tx, which must come from
// Transact: what it writes is committed with tx or not at all, and if it fails, only what it wrote itself is undone. So
// what stands around a handler can commit something of its own together with the handler's effect.
//
// Transact then returns before anything is committed: what is read past its tx does not show what it wrote. A handler
// must not call Transact from several goroutines at once, since they would share a connection.
func Join(ctx context.Context, db *pgxpool.Pool, tx pgx.Tx) context.Context {
	return context.WithValue(ctx, joinKey{db}, tx.(*transaction))
}

func joined(ctx context.Context, db *pgxpool.Pool) *transaction {
	tx, _ := ctx.Value(joinKey{db}).(*transaction)
	return tx
}

// transactWithin is transactOnce within another transaction, by a savepoint.
func transactWithin(ctx context.Context, db *pgxpool.Pool, fn func(tx pgx.Tx) error) error {
	tx, err := joined(ctx, db).savepoint(ctx)
	if err != nil {
		return Classify(err)
	}
	// What is nested in fn is part of this part.
	if err := runIn(ctx, tx, fn); err != nil {
		return err
	}
	return Classify(tx.Commit(ctx))
}
