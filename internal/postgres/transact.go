package postgres

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
)

var (
	// ErrUnavailable means that the database could not be reached or would not take work, and that nothing was written.
	ErrUnavailable = errors.New("database unavailable")
	// ErrOutcomeUnknown means that the transaction may or may not be committed.
	ErrOutcomeUnknown = errors.New("outcome of the commit is unknown")
)

const (
	// commitTimeout bounds COMMIT and what is sent with it, which the caller's context does not: pgx would cancel it in the server, and a commit that
	// is cancelled while it waits for its standby is visible although it is not safe.
	commitTimeout = 10 * time.Second
	// maxRuns is how often a transaction is run at most when others get in its way (40001, 40P01).
	maxRuns = 4
)

// Transact runs fn in one READ COMMITTED transaction and commits it. When Postgres chooses the transaction as the victim
// of a deadlock or a serialization failure, it runs fn again, up to three times: fn must not keep state of its own between runs.
// BEGIN is sent with fn's first statement, and what is Deferred with COMMIT.
//
// Its errors are those of fn, the end of ctx, Postgres' refusal of COMMIT (a *pgconn.PgError, as for a deferred constraint), or wrap
// ErrUnavailable; with all of these nothing was written. Or they wrap ErrOutcomeUnknown. If ctx comes of Join, the transaction is part of another.
//
// Once fn has returned, ctx ends nothing any more. If what is Deferred waits for a lock for longer than 10 s, the outcome is unknown.
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
	tx := &transaction{Tx: &beginning{conn: conn.Conn(), ctx: ctx}}
	settle, decided := collectAfterCommit(conn.Conn().PgConn()), false
	defer func() {
		if decided {
			return
		}
		// Also reached when fn panics. The context may be done; the connection goes back to the pool clean or not at all.
		rollbackCtx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
		defer cancel()
		_ = tx.Rollback(rollbackCtx)
		settle(false)
	}()
	if err := fn(tx); err != nil {
		return Classify(err)
	}
	if err := ctx.Err(); err != nil {
		return err // the caller has left: better nothing than an effect that nobody hears of
	}
	decided = true
	err = committing(ctx, conn.Conn(), tx.Commit)
	settle(err == nil || errors.Is(err, ErrOutcomeUnknown))
	return err
}

// TransactRow runs a statement that is a transaction by itself, in one round trip, and scans the row that it returns. Its errors are those of
// Transact, and pgx.ErrNoRows.
func TransactRow(ctx context.Context, db *pgxpool.Pool, sql string, args []any, dest ...any) error {
	return alone(ctx, db, func(ctx context.Context, conn *pgx.Conn) error { return conn.QueryRow(ctx, sql, args...).Scan(dest...) })
}

// TransactRows is TransactRow for a statement that returns any number of rows, none included. What fn collects counts only if there is no error.
func TransactRows(ctx context.Context, db *pgxpool.Pool, sql string, args []any, fn func(rows pgx.Rows) error) error {
	return alone(ctx, db, func(ctx context.Context, conn *pgx.Conn) error {
		rows, err := conn.Query(ctx, sql, args...)
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

// alone runs fn, which runs one statement that commits by itself.
func alone(ctx context.Context, db *pgxpool.Pool, fn func(ctx context.Context, conn *pgx.Conn) error) error {
	conn, err := db.Acquire(ctx)
	if err != nil {
		return Classify(fmt.Errorf("acquire connection: %w", err))
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
	if err == nil || certainlyNotCommitted(err) {
		return Classify(err)
	}
	return fmt.Errorf("commit: %w: %w", ErrOutcomeUnknown, err)
}

// certainlyNotCommitted tells an error of COMMIT that is the server's refusal from one that says nothing.
func certainlyNotCommitted(err error) bool {
	var refused *pgconn.PgError
	switch {
	case errors.Is(err, pgx.ErrTxCommitRollback), errors.Is(err, pgx.ErrNoRows):
		return true
	case errors.As(err, &refused):
		// 08 connection exception and 57P0x shutdown can come after the commit record was written.
		return !strings.HasPrefix(refused.Code, "08") && !strings.HasPrefix(refused.Code, "57P")
	}
	return false
}

func isConflict(err error) bool {
	var refused *pgconn.PgError
	return errors.As(err, &refused) && (refused.Code == "40001" || refused.Code == "40P01")
}

// Classify wraps err in ErrUnavailable if it says that the database is away, shutting down, starting up, read-only or
// out of connections; every other error is returned as it is. It is for errors before COMMIT, when nothing is written yet.
func Classify(err error) error {
	if err == nil || errors.Is(err, ErrUnavailable) || errors.Is(err, ErrOutcomeUnknown) || !isUnavailable(err) {
		return err
	}
	return fmt.Errorf("%w: %w", ErrUnavailable, err)
}

func isUnavailable(err error) bool {
	var refused *pgconn.PgError
	if errors.As(err, &refused) {
		switch refused.Code {
		case "53300", // too many connections
			"57P01", "57P02", "57P03", // shutting down, crashed, starting up
			"25006",          // read-only: a standby, or a primary that was demoted
			"53100", "53200": // disk full, out of memory
			return true
		}
		return strings.HasPrefix(refused.Code, "08")
	}
	var dial *pgconn.ConnectError
	var network net.Error
	switch {
	case errors.As(err, &dial):
		return true
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return false // the caller's own deadline: the database may be well
	}
	return errors.As(err, &network) || errors.Is(err, pgconn.ErrConnClosed) || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF)
}
