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

// The three things that an error of the database can mean to a caller. All other errors are the fault of whoever wrote
// the statement, and the same statement fails again. Nobody else looks at SQLSTATEs: they ask with errors.Is.
var (
	// ErrUnavailable means that the database cannot be reached or takes no work, and that nothing was written. It is
	// nobody's fault who asks: waiting helps.
	ErrUnavailable = errors.New("database unavailable")
	// ErrBusy means that the database works and others were in the way, or that time or room ran out: a lock, a
	// deadlock, a timeout. Nothing was written, and the same may succeed when it is tried again.
	ErrBusy = errors.New("database busy")
	// ErrOutcomeUnknown means that the transaction may or may not be committed.
	ErrOutcomeUnknown = errors.New("outcome of the commit is unknown")
)

// verdict is what an error means while nothing is committed yet.
type verdict int

const (
	own  verdict = iota // the statement's or the function's own fault, or the end of the caller's context
	busy                // ErrBusy
	away                // ErrUnavailable
)

// states are the SQLSTATEs of an ERROR, after which the session goes on, that are not the statement's fault. They are
// looked up in this order: a code before its class. See the appendix on error codes in PostgreSQL's manual.
var states = []struct {
	prefix string
	verdict
}{
	{"08", busy},    // connection exception: of a foreign server, since ours has just answered
	{"25006", away}, // read-only: a standby, or a primary that was demoted
	{"40002", own},  // integrity constraint violation
	{"40", busy},    // serialization failure, deadlock
	{"53100", away}, // disk full
	{"53", busy},    // out of memory, of locks or of connections to elsewhere: perhaps for this statement only
	{"55P03", busy}, // lock not available
	{"57014", busy}, // statement_timeout, or cancelled by an operator
	{"57P", busy},   // a foreign server shuts down
	{"58", busy},    // I/O error
}

// stoodStill are the SQLSTATEs by which Postgres ends a session because its transaction took too long: the function's
// doing, not the database's.
var stoodStill = []string{"25P03", "25P04"} // idle_in_transaction_session_timeout, transaction_timeout

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
		return own // the caller's deadline: the database may be well
	case errors.As(err, &network), errors.Is(err, pgconn.ErrConnClosed), errors.Is(err, io.EOF),
		errors.Is(err, io.ErrUnexpectedEOF):
		return away
	}
	return own
}

func judgeState(refused *pgconn.PgError) verdict {
	switch severity(refused) {
	case "FATAL", "PANIC": // the connection ends, whatever the code
		if slices.Contains(stoodStill, refused.Code) {
			return busy
		}
		return away
	}
	if isStalePlan(refused) {
		return busy
	}
	for _, one := range states {
		if strings.HasPrefix(refused.Code, one.prefix) {
			return one.verdict
		}
	}
	return own
}

func severity(refused *pgconn.PgError) string {
	return cmp.Or(refused.SeverityUnlocalized, refused.Severity)
}

// isStalePlan recognizes a prepared statement whose result a migration has changed. pgx prepares it anew the next time.
func isStalePlan(refused *pgconn.PgError) bool {
	return refused.Code == "0A000" && refused.Routine == "RevalidateCachedQuery"
}

// Classify wraps an error of a call to the database in ErrUnavailable or ErrBusy if it means that, and returns every
// other error as it is. It is for errors before COMMIT, when nothing is written yet. Of an error that a function
// returned which may have called others as well, ask blame.
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

// blame classifies an error that a function returned which ran in tx, a transaction of Transact. An error that only
// looks like the database's stays as it is: the io.EOF of a decoder, a refused HTTP call, another database that is
// away. Only tx's own connection tells them apart.
func blame(tx pgx.Tx, err error) error {
	// A savepoint may have been rolled back since, and the connection be well: a conflict is one all the same.
	if stateOf(tx).broken() || judge(err) == busy {
		return Classify(err)
	}
	return err
}

// IsAway tells whether a function that ran in tx failed with err because the database is away, or takes no work at all.
// Unlike errors.Is(err, ErrUnavailable) it is not taken in by another database's error.
func IsAway(tx pgx.Tx, err error) bool {
	return stateOf(tx).broken() && errors.Is(Classify(err), ErrUnavailable)
}

// Committable returns why tx, a transaction of Transact or a savepoint in it, cannot be committed although its function
// returned nil.
func Committable(tx pgx.Tx) error {
	s := stateOf(tx)
	switch {
	case s.failed != nil:
		return fmt.Errorf("%w: %w", pgx.ErrTxCommitRollback, Classify(s.failed))
	case s.closed:
		return fmt.Errorf("%w: the connection was closed in the course of the transaction, as by a deadline on a "+
			"statement",
			ErrUnavailable)
	case s.busy:
		return errors.New("the rows of a query were not closed")
	case s.status == 'E':
		return pgx.ErrTxCommitRollback
	case s.begun && s.status == 'I':
		return fmt.Errorf("%w: a statement of the function has ended the transaction, which is not its own",
			ErrOutcomeUnknown)
	}
	return nil
}

// state is how a transaction stands.
type state struct {
	begun  bool
	failed error // why it could not begin
	closed bool  // the connection
	busy   bool  // an answer was not read to its end
	status byte  // as the server said last: T for a transaction, E for one that failed, I for none
}

// broken tells whether a statement of the transaction has failed.
func (s state) broken() bool { return s.closed || s.status == 'E' || s.failed != nil }

// stateOf looks at tx without beginning it.
func stateOf(tx pgx.Tx) state {
	t, ok := tx.(*transaction)
	if !ok { // another's
		return stateOn(tx.Conn(), state{begun: true})
	}
	first := cmp.Or(t.root, t).Tx.(*beginning)
	return stateOn(first.conn, state{begun: first.Tx != nil, failed: first.failed})
}

func stateOn(conn *pgx.Conn, s state) state {
	s.closed, s.busy, s.status = conn.IsClosed(), conn.PgConn().IsBusy(), conn.PgConn().TxStatus()
	return s
}

// classifyCommit judges an error of COMMIT, or of a statement that commits by itself. Only the server's refusal by an
// ERROR proves that nothing was committed. FATAL, PANIC, the loss of the connection and a shutdown can come after the
// commit record was written, and so can what a pooler says of its own.
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

// isConflict tells whether the same transaction may succeed when it is run again at once.
func isConflict(err error) bool {
	var refused *pgconn.PgError
	return errors.As(err, &refused) && !errors.Is(err, ErrOutcomeUnknown) &&
		(refused.Code == "40001" || refused.Code == "40P01" || isStalePlan(refused))
}

// IsLocked tells whether a statement gave up waiting for a lock, or was told not to wait.
func IsLocked(err error) bool {
	var refused *pgconn.PgError
	return errors.As(err, &refused) && refused.Code == "55P03"
}

// Violates tells whether a statement was refused in the name of a constraint.
func Violates(err error, constraint string) bool {
	var refused *pgconn.PgError
	return errors.As(err, &refused) && refused.ConstraintName == constraint
}
