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
	// commitTimeout bounds COMMIT and the statements sent with it. The caller's context does not: pgx would cancel them
	// in the server, and a commit cancelled while it waits for its standby is visible although it is not safe.
	commitTimeout = 10 * time.Second
	// maxRuns is how often a transaction runs at most if it conflicts with others (40001, 40P01).
	maxRuns = 4
)

// Transact runs fn in one READ COMMITTED transaction and commits it. When Postgres chooses the transaction as the
// victim of a deadlock or a serialization failure, Transact runs fn again, up to three times. fn must not keep state
// between runs. BEGIN is sent with fn's first statement, and Deferred values with COMMIT.
//
// If Transact returns an error other than ErrOutcomeUnknown, nothing was written. The error is fn's own, ctx's, or
// Postgres' refusal of COMMIT (a *pgconn.PgError, for example from a deferred constraint). It wraps ErrUnavailable or
// ErrBusy if the database is to blame, judged by the transaction's own connection. If ctx comes from Join, the
// transaction is part of another.
//
// Once fn has returned, the end of ctx interrupts nothing. COMMIT and the statements sent with it may take 10 s; after
// that the outcome is unknown.
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
	// Do not use db.Begin: its Commit releases the connection, which committing still reads.
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

// runIn runs fn in tx, a transaction or a savepoint. It rolls tx back if fn fails or panics, or if tx cannot be
// committed.
func runIn(ctx context.Context, tx *transaction, fn func(tx pgx.Tx) error) error {
	succeeded := false
	defer func() {
		if succeeded {
			return
		}
		// Roll back even if ctx is done: the connection must return to the pool clean or not at all.
		rollbackCtx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
		defer cancel()
		_ = tx.Rollback(rollbackCtx)
	}()
	if err := fn(tx); err != nil {
		return blame(tx, err)
	}
	if err := ctx.Err(); err != nil {
		return err // the caller has left: commit nothing rather than something that it never learns about
	}
	if err := Committable(tx); err != nil {
		return err
	}
	succeeded = true
	return nil
}

// TransactRow runs a statement as its own transaction, in one round trip, and scans the row that it returns. It returns
// the errors of Transact and pgx.ErrNoRows.
func TransactRow(ctx context.Context, db *pgxpool.Pool, sql string, args []any, dest ...any) error {
	return alone(ctx, db, func(ctx context.Context, on querier) error {
		return on.QueryRow(ctx, sql, args...).Scan(dest...)
	})
}

// TransactRows is TransactRow for a statement that returns any number of rows, including none. The rows that fn
// collects are valid only if TransactRows returns no error.
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
		rows.Close() // reads the outcome of the commit
		return rows.Err()
	})
}

// querier is a connection or a transaction.
type querier interface {
	Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error)
	QueryRow(ctx context.Context, sql string, args ...any) pgx.Row
}

// alone runs fn, which runs one statement. On a session that is set up, the statement commits implicitly. Through a
// pooler it needs a transaction that sets the session up.
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

// committing runs fn, which commits, and classifies the outcome.
func committing(ctx context.Context, conn *pgx.Conn, fn func(ctx context.Context) error) error {
	notes := conn.PgConn().CustomData()
	delete(notes, syncWaitCancelled) // may be left from a statement that committed implicitly outside this package
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), commitTimeout)
	defer cancel()
	err := fn(ctx)
	if err == nil && notes[syncWaitCancelled] == true {
		return fmt.Errorf("commit: wait for the standby was cancelled: %w", ErrOutcomeUnknown)
	}
	return classifyCommit(err)
}
