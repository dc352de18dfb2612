package postgres

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

const (
	// commitTimeout bounds COMMIT and what is sent with it, which the caller's context does not: pgx would cancel it in
	// the server, and a commit that is cancelled while it waits for its standby is visible although it is not safe.
	commitTimeout = 10 * time.Second
	// maxRuns is how often a transaction is run at most when others get in its way (40001, 40P01).
	maxRuns = 4
)

// Transact runs fn in one READ COMMITTED transaction and commits it. When Postgres chooses the transaction as the
// victim of a deadlock or a serialization failure, it runs fn again, up to three times: fn must not keep state between
// runs. BEGIN is sent with fn's first statement, and what is Deferred with COMMIT.
//
// With every error but ErrOutcomeUnknown nothing was written. The error is fn's own, the end of ctx, or Postgres'
// refusal of COMMIT (a *pgconn.PgError, as for a deferred constraint); or it wraps ErrUnavailable or ErrBusy if the
// database is to blame, as seen on the transaction's own connection. If ctx comes from Join, the transaction is part of
// another.
//
// Once fn has returned, ctx ends nothing any more. COMMIT and what is sent with it may take 10 s; then the outcome is
// unknown.
func Transact(ctx context.Context, db *pgxpool.Pool, fn func(tx pgx.Tx) error) error {
	once := transactOnce
	if joined(ctx, db) != nil {
		once = transactWithin
	}
	for run := 1; ; run++ {
		err := once(ctx, db, fn)
		if !isConflict(err) || run == maxRuns {
			return err
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(time.Duration(1+rand.IntN(10*run)) * time.Millisecond):
		}
	}
}

func transactOnce(ctx context.Context, db *pgxpool.Pool, fn func(tx pgx.Tx) error) error {
	// Not db.Begin, whose Commit gives the connection away: committing reads from it afterwards.
	conn, err := db.Acquire(ctx)
	if err != nil {
		return Classify(fmt.Errorf("acquire connection: %w", err))
	}
	defer conn.Release()
	tx := &transaction{Tx: &beginning{conn: conn.Conn(), ctx: ctx}, pending: new(pending)}
	if err := runIn(ctx, tx, fn); err != nil {
		return err
	}
	err = committing(ctx, conn.Conn(), tx.Commit)
	if err == nil || errors.Is(err, ErrOutcomeUnknown) {
		for _, after := range tx.pending.after {
			after()
		}
	}
	return err
}

// runIn runs fn in tx, a transaction or a savepoint, and rolls it back if it fails or panics, or cannot be committed.
func runIn(ctx context.Context, tx *transaction, fn func(tx pgx.Tx) error) error {
	succeeded := false
	defer func() {
		if succeeded {
			return
		}
		// The context may be done; the connection goes back to the pool clean or not at all.
		rollbackCtx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
		defer cancel()
		_ = tx.Rollback(rollbackCtx)
	}()
	if err := fn(tx); err != nil {
		return blame(tx, err)
	}
	if err := ctx.Err(); err != nil {
		return err // the caller has left: better nothing than an effect that nobody hears of
	}
	if err := Committable(tx); err != nil {
		return err
	}
	succeeded = true
	return nil
}

// TransactRow runs a statement that is a transaction by itself, in one round trip, and scans the row that it returns.
// Its errors are those of Transact, and pgx.ErrNoRows.
func TransactRow(ctx context.Context, db *pgxpool.Pool, sql string, args []any, dest ...any) error {
	return alone(ctx, db, func(ctx context.Context,
		on querier) error {
		return on.QueryRow(ctx, sql, args...).Scan(dest...)
	})
}

// TransactRows is TransactRow for a statement that returns any number of rows, none included. What fn collects counts
// only if there is no error.
func TransactRows(ctx context.Context, db *pgxpool.Pool, sql string, args []any, fn func(rows pgx.Rows) error) error {
	return alone(ctx, db, func(ctx context.Context, on querier) error {
		rows, err := on.Query(ctx, sql, args...)
		if err != nil {
			return err
		}
		defer rows.Close()
		if err := fn(rows); err != nil {
			return err
		}
		rows.Close() // and with it comes what became of the commit
		return rows.Err()
	})
}

// querier is a connection or a transaction.
type querier interface {
	Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error)
	QueryRow(ctx context.Context, sql string, args ...any) pgx.Row
}

// alone runs fn, which runs one statement. On a session that is set up it commits by itself; through a pooler it needs
// a transaction that sets it up.
func alone(ctx context.Context, db *pgxpool.Pool, fn func(ctx context.Context, on querier) error) error {
	conn, err := db.Acquire(ctx)
	if err != nil {
		return Classify(fmt.Errorf("acquire connection: %w", err))
	}
	if local, _ := conn.Conn().PgConn().CustomData()[settingSQL].(string); local != "" {
		conn.Release()
		return Transact(ctx, db, func(tx pgx.Tx) error { return fn(ctx, tx) })
	}
	defer conn.Release()
	return committing(ctx, conn.Conn(), func(ctx context.Context) error { return fn(ctx, conn.Conn()) })
}

// committing runs fn, which commits, and finds out whether it did.
func committing(ctx context.Context, conn *pgx.Conn, fn func(ctx context.Context) error) error {
	notes := conn.PgConn().CustomData()
	delete(notes, syncWaitCancelled) // may be left from a statement outside of this package, which committed by itself
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), commitTimeout)
	defer cancel()
	err := fn(ctx)
	if err == nil && notes[syncWaitCancelled] == true {
		return fmt.Errorf("commit: wait for the standby was cancelled: %w", ErrOutcomeUnknown)
	}
	return classifyCommit(err)
}
