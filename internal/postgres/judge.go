package postgres

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// The classes of database errors that callers distinguish. Every other error is the statement's own fault, and the same
// statement would fail again. Only this file reads SQLSTATEs; other code uses errors.Is.
var (
	// ErrUnavailable means that the database cannot be reached or accepts no work, and that nothing was written. The
	// caller is not at fault and should wait.
	ErrUnavailable = errors.New("database unavailable")
	// ErrBusy means that the database works, but other transactions were in the way or a resource ran out: a lock, a
	// deadlock, a timeout, memory. Nothing was written, and a retry may succeed.
	ErrBusy = errors.New("database busy")
	// ErrOutcomeUnknown means that the transaction may or may not be committed.
	ErrOutcomeUnknown = errors.New("outcome of the commit is unknown")
)

// verdict is the class of an error that occurs before COMMIT.
type verdict int

const (
	own  verdict = iota // the fault of the statement or the function, or the end of the caller's context
	busy                // ErrBusy
	away                // ErrUnavailable
)

// states are the SQLSTATEs of severity ERROR, after which the session continues, that are not the statement's fault.
// The first match counts, so a code comes before its class. See the appendix on error codes in PostgreSQL's manual.
var states = []struct {
	prefix string
	verdict
}{
	{"08", busy},    // connection exception of a foreign server, since this one has just answered
	{"25006", away}, // read-only: a standby, or a primary that was demoted
	{"40002", own},  // integrity constraint violation
	{"40", busy},    // serialization failure, deadlock
	{"53100", away}, // disk full
	{"53", busy},    // out of memory, locks or connections to a foreign server: perhaps only for this statement
	{"55P03", busy}, // lock not available
	{"57014", busy}, // statement_timeout, or cancelled by an operator
	{"57P", busy},   // a foreign server shuts down
	{"58", busy},    // I/O error
}

// tooSlow are the SQLSTATEs with which Postgres ends a session because its transaction took too long. The function
// caused that, not the database.
var tooSlow = []string{"25P03", "25P04"} // idle_in_transaction_session_timeout, transaction_timeout

func judge(err error) verdict {
	var refused *pgconn.PgError
	var dial *pgconn.ConnectError
	var network net.Error
	switch {
	case errors.As(err, &dial):
		return away
	case errors.As(err, &refused):
		return judgeState(refused)
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return own // the caller's deadline: the database may be healthy
	case errors.As(err, &network), errors.Is(err, pgconn.ErrConnClosed),
		errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return away
	}
	return own
}

func judgeState(refused *pgconn.PgError) verdict {
	switch severity(refused) {
	case "FATAL", "PANIC": // the connection ends, regardless of the code
		if slices.Contains(tooSlow, refused.Code) {
			return busy
		}
		return away
	}
	if isStalePlan(refused) {
		return busy
	}
	for _, state := range states {
		if strings.HasPrefix(refused.Code, state.prefix) {
			return state.verdict
		}
	}
	return own
}

func severity(refused *pgconn.PgError) string {
	return cmp.Or(refused.SeverityUnlocalized, refused.Severity)
}

// isStalePlan reports whether a migration has changed the result type of a prepared statement. pgx prepares the
// statement anew the next time.
func isStalePlan(refused *pgconn.PgError) bool {
	return refused.Code == "0A000" && refused.Routine == "RevalidateCachedQuery"
}

// Classify wraps an error of a database call in ErrUnavailable or ErrBusy if it belongs to one of these classes, and
// returns every other error unchanged. Use it for errors before COMMIT, when nothing is written yet. For the error of a
// function that may also have called other systems, use blame.
func Classify(err error) error {
	if err == nil || errors.Is(err, ErrUnavailable) || errors.Is(err, ErrBusy) || errors.Is(err, ErrOutcomeUnknown) {
		return err
	}
	switch judge(err) {
	case away:
		return fmt.Errorf("%w: %w", ErrUnavailable, err)
	case busy:
		return fmt.Errorf("%w: %w", ErrBusy, err)
	}
	return err
}

// blame classifies the error of a function that ran in tx, a transaction of Transact. It returns unchanged an error
// that only looks like the database's: a decoder's io.EOF, a refused HTTP call, another database's outage. Only the
// state of tx's own connection tells them apart.
func blame(tx pgx.Tx, err error) error {
	// The function may have rolled back a savepoint since, so that the connection is healthy. A conflict still counts.
	if stateOf(tx).broken() || judge(err) == busy {
		return Classify(err)
	}
	return err
}

// IsAway reports whether a function that ran in tx failed with err because the database is down or accepts no work.
// Unlike errors.Is(err, ErrUnavailable), it does not mistake another database's error for that.
func IsAway(tx pgx.Tx, err error) bool {
	return stateOf(tx).broken() && errors.Is(Classify(err), ErrUnavailable)
}

// Committable returns the reason that tx, a transaction of Transact or a savepoint in it, cannot be committed although
// its function returned nil. It returns nil if tx can be committed.
func Committable(tx pgx.Tx) error {
	s := stateOf(tx)
	switch {
	case s.failed != nil:
		return fmt.Errorf("%w: %w", pgx.ErrTxCommitRollback, Classify(s.failed))
	case s.closed:
		return fmt.Errorf("%w: the connection was closed during the transaction, for example by a statement's deadline",
			ErrUnavailable)
	case s.busy:
		return errors.New("the rows of a query were not closed")
	case s.status == 'E':
		return pgx.ErrTxCommitRollback
	case s.begun && s.status == 'I':
		return fmt.Errorf("%w: a statement of the function has ended the transaction, which only Transact may do",
			ErrOutcomeUnknown)
	}
	return nil
}

// state is the state of a transaction and its connection.
type state struct {
	begun  bool
	failed error // why it could not begin
	closed bool  // the connection is closed
	busy   bool  // a result was not read to its end
	status byte  // the server's last report: T in a transaction, E in a failed one, I in none
}

// broken reports whether a statement of the transaction has failed.
func (s state) broken() bool { return s.closed || s.status == 'E' || s.failed != nil }

// stateOf returns the state of tx without beginning it.
func stateOf(tx pgx.Tx) state {
	t, ok := tx.(*transaction)
	if !ok { // not begun by Transact
		return stateOn(tx.Conn(), state{begun: true})
	}
	first := cmp.Or(t.root, t).Tx.(*beginning)
	return stateOn(first.conn, state{begun: first.Tx != nil, failed: first.failed})
}

func stateOn(conn *pgx.Conn, s state) state {
	s.closed, s.busy, s.status = conn.IsClosed(), conn.PgConn().IsBusy(), conn.PgConn().TxStatus()
	return s
}

// classifyCommit classifies an error of COMMIT, or of a statement that commits implicitly. Only an error of severity
// ERROR from the server proves that nothing was committed. FATAL, PANIC, a lost connection and a shutdown can follow
// the write of the commit record, and so can a pooler's own errors.
func classifyCommit(err error) error {
	var refused *pgconn.PgError
	definite := err == nil || errors.Is(err, pgx.ErrTxCommitRollback) || errors.Is(err, pgx.ErrNoRows)
	if !definite && errors.As(err, &refused) {
		definite = severity(refused) == "ERROR" && refused.Code != "40003" && // statement completion unknown
			!strings.HasPrefix(refused.Code, "08") && !strings.HasPrefix(refused.Code, "57P")
	}
	if definite {
		return Classify(err)
	}
	return fmt.Errorf("commit: %w: %w", ErrOutcomeUnknown, err)
}

// isConflict reports whether the same transaction may succeed if it runs again immediately.
func isConflict(err error) bool {
	var refused *pgconn.PgError
	return errors.As(err, &refused) && !errors.Is(err, ErrOutcomeUnknown) &&
		(refused.Code == "40001" || refused.Code == "40P01" || isStalePlan(refused))
}

// IsLocked reports whether a statement gave up waiting for a lock, or did not wait because of NOWAIT.
func IsLocked(err error) bool {
	var refused *pgconn.PgError
	return errors.As(err, &refused) && refused.Code == "55P03"
}

// Violates reports whether Postgres refused a statement because it violates the constraint.
func Violates(err error, constraint string) bool {
	var refused *pgconn.PgError
	return errors.As(err, &refused) && refused.ConstraintName == constraint
}
