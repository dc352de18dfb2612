package postgres

import (
	"context"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

// joinKey is the context key of the transaction that transactions on db join.
type joinKey struct{ db *pgxpool.Pool }

// Join returns a context in which Transact on db begins no transaction but runs as part of tx, which must come from
// Transact. The writes of the inner Transact are committed with tx or not at all, and if it fails, only its own writes
// are undone. So the code that calls a handler can commit its own writes together with the handler's effect.
//
// The inner Transact returns before anything is committed, so reads outside tx do not see its writes. A handler must
// not call Transact from several goroutines at once, because they would share a connection.
func Join(ctx context.Context, db *pgxpool.Pool, tx pgx.Tx) context.Context {
	return context.WithValue(ctx, joinKey{db}, tx.(*transaction))
}

func joined(ctx context.Context, db *pgxpool.Pool) *transaction {
	tx, _ := ctx.Value(joinKey{db}).(*transaction)
	return tx
}

// transactWithin is transactOnce inside another transaction. It uses a savepoint.
func transactWithin(ctx context.Context, db *pgxpool.Pool, fn func(tx pgx.Tx) error) error {
	tx, err := joined(ctx, db).savepoint(ctx)
	if err != nil {
		return Classify(err)
	}
	// A Transact that fn calls makes its savepoint inside this one.
	if err := runIn(ctx, tx, fn); err != nil {
		return err
	}
	return Classify(tx.Commit(ctx))
}
