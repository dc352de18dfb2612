package postgres

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
)

// verdicts lists every class of SQLSTATE, and the codes that differ from their class, with the verdict on an ERROR
// before COMMIT and at COMMIT. FATAL and PANIC are "away" before COMMIT and "unknown" at COMMIT, regardless of the
// code.
var verdicts = map[string][2]string{
	// class or code: before COMMIT, at COMMIT
	"00": {"own", "own"}, "01": {"own", "own"}, "02": {"own", "own"}, "03": {"own", "own"}, "09": {"own", "own"},
	"0A": {"own", "own"}, "0B": {"own", "own"}, "0F": {"own", "own"}, "0L": {"own", "own"}, "0P": {"own", "own"},
	"0Z": {"own", "own"}, "20": {"own", "own"}, "21": {"own", "own"}, "22": {"own", "own"}, "23": {"own", "own"},
	"24": {"own", "own"}, "25": {"own", "own"}, "26": {"own", "own"}, "27": {"own", "own"}, "28": {"own", "own"},
	"2B": {"own", "own"}, "2D": {"own", "own"}, "2F": {"own", "own"}, "34": {"own", "own"}, "38": {"own", "own"},
	"39": {"own", "own"}, "3B": {"own", "own"}, "3D": {"own", "own"}, "3F": {"own", "own"}, "42": {"own", "own"},
	"44": {"own", "own"}, "54": {"own", "own"}, "55": {"own", "own"}, "72": {"own", "own"}, "F0": {"own", "own"},
	"HV": {"own", "own"}, "P0": {"own", "own"}, "XX": {"own", "own"},
	"08":    {"busy", "unknown"},
	"25006": {"away", "away"}, "25P03": {"own", "own"}, "25P04": {"own", "own"},
	"40": {"busy", "busy"}, "40001": {"busy", "busy"}, "40002": {"own", "own"}, "40003": {"busy", "unknown"},
	"40P01": {"busy", "busy"},
	"53":    {"busy", "busy"}, "53100": {"away", "away"}, "53200": {"busy", "busy"}, "53300": {"busy", "busy"},
	"55P03": {"busy", "busy"},
	"57":    {"own", "own"}, "57014": {"busy", "busy"}, "57P01": {"busy", "unknown"}, "57P02": {"busy", "unknown"},
	"57P03": {"busy", "unknown"}, "57P04": {"busy", "unknown"}, "57P05": {"busy", "unknown"},
	"58": {"busy", "busy"}, "58030": {"busy", "busy"},
}

func verdictOf(err error) string {
	said := []string{}
	for name, sentinel := range map[string]error{"away": ErrUnavailable, "busy": ErrBusy, "unknown": ErrOutcomeUnknown} {
		if errors.Is(err, sentinel) {
			said = append(said, name)
		}
	}
	if len(said) == 0 {
		return "own"
	}
	return strings.Join(said, " and ")
}

func TestVerdicts(t *testing.T) {
	t.Parallel()
	for code, want := range verdicts {
		for _, severity := range []string{"ERROR", "FATAL", "PANIC"} {
			full := (code + "000")[:5]
			refused := fmt.Errorf("query: %w", &pgconn.PgError{
				Code: full, Severity: "FEHLER", SeverityUnlocalized: severity, Message: "text",
			})
			before, at := want[0], want[1]
			if severity != "ERROR" {
				at, before = "unknown", "away"
				if slices.Contains(tooSlow, full) {
					before = "busy"
				}
			}
			if got := verdictOf(Classify(refused)); got != before {
				t.Errorf("%s %s before COMMIT is %q, want %q", severity, full, got, before)
			}
			if got := verdictOf(classifyCommit(refused)); got != at {
				t.Errorf("%s %s at COMMIT is %q, want %q", severity, full, got, at)
			}
			if again := Classify(Classify(refused)); verdictOf(again) != before || !errors.Is(again, refused) {
				t.Errorf("%s %s becomes %v when classified twice", severity, full, again)
			}
		}
	}
	// An error without a severity, as some poolers send it, proves nothing at COMMIT.
	if got := verdictOf(classifyCommit(&pgconn.PgError{Code: "23505"})); got != "unknown" {
		t.Errorf("without severity: %q", got)
	}
}

func TestVerdictsOnOtherErrors(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		err        error
		before, at string
	}{
		{io.EOF, "away", "unknown"},
		{io.ErrUnexpectedEOF, "away", "unknown"},
		{pgconn.ErrConnClosed, "away", "unknown"},
		{&net.OpError{Op: "read", Err: errProbe}, "away", "unknown"},
		{context.Canceled, "own", "unknown"},
		{context.DeadlineExceeded, "own", "unknown"},
		{errProbe, "own", "unknown"},
		{pgx.ErrNoRows, "own", "own"},
		{pgx.ErrTxCommitRollback, "own", "own"},
	} {
		if got := verdictOf(Classify(test.err)); got != test.before {
			t.Errorf("%v before COMMIT is %q, want %q", test.err, got, test.before)
		}
		if got := verdictOf(classifyCommit(test.err)); got != test.at {
			t.Errorf("%v at COMMIT is %q, want %q", test.err, got, test.at)
		}
	}
	if Classify(nil) != nil || classifyCommit(nil) != nil {
		t.Error("nil became an error")
	}
}

// The function's own error stays unchanged, even if it looks like the database's.
func TestBlameAsksTheConnection(t *testing.T) {
	t.Parallel()
	db := setup(t)
	closed, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	closed.Close()
	for name, fn := range map[string]func(tx pgx.Tx) error{
		"decoder": func(pgx.Tx) error { return json.NewDecoder(strings.NewReader("")).Decode(new(int)) },
		"HTTP": func(pgx.Tx) error {
			_, err := http.Get("http://" + closed.Addr().String())
			return err
		},
		"another database": func(pgx.Tx) error {
			_, err := pgx.Connect(t.Context(), "postgres://u@"+closed.Addr().String()+"/d")
			return err
		},
		"another that shuts down": func(pgx.Tx) error { return &pgconn.PgError{Code: "57P01", Severity: "FATAL"} },
	} {
		for _, begun := range []bool{false, true} {
			err := Transact(t.Context(), db, func(tx pgx.Tx) error {
				if begun {
					if err := insert(t, 1)(tx); err != nil {
						t.Error(err)
					}
				}
				err := fn(tx)
				if IsAway(tx, err) {
					t.Errorf("%s: IsAway is true for %v", name, err)
				}
				return err
			})
			if err == nil || verdictOf(err) != "own" {
				t.Errorf("%s, begun %t: got %v", name, begun, err)
			}
			wantRows(t, db, 0)
		}
	}
}

// ErrBusy reports that nothing was written and that a retry is safe.
func TestBusy(t *testing.T) {
	t.Parallel()
	db := setup(t)
	exec(t, db, `INSERT INTO t VALUES (1)`)
	holder, err := db.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = holder.Rollback(context.WithoutCancel(t.Context())) }()
	if err := insert(t, 2)(holder); err != nil {
		t.Fatal(err)
	}
	impatient := alter(t, db, func(c *pgxpool.Config) { c.ConnConfig.RuntimeParams["lock_timeout"] = "50" })
	slow := alter(t, db, func(c *pgxpool.Config) { c.ConnConfig.RuntimeParams["statement_timeout"] = "50" })
	statement := func(sql string) func(tx pgx.Tx) error {
		return func(tx pgx.Tx) error { _, err := tx.Exec(t.Context(), sql); return err }
	}
	for name, err := range map[string]error{
		"lock":              Transact(t.Context(), impatient, insert(t, 2)),
		"lock at COMMIT":    Transact(t.Context(), impatient, deferring(2)),
		"statement timeout": Transact(t.Context(), slow, statement(`SELECT pg_sleep(10)`)),
		"conflict":          Transact(t.Context(), db, statement(`DO $$ BEGIN RAISE SQLSTATE '40001'; END $$`)),
		"in a savepoint": Transact(t.Context(), impatient, func(tx pgx.Tx) error {
			return pgx.BeginFunc(t.Context(), tx, func(tx pgx.Tx) error { return insert(t, 2)(tx) })
		}),
		"in a joined transaction": Transact(t.Context(), impatient, func(tx pgx.Tx) error {
			return Transact(Join(t.Context(), impatient, tx), impatient, insert(t, 2))
		}),
		"alone": TransactRow(t.Context(), impatient, `INSERT INTO t VALUES (2) RETURNING n`, nil, new(int)),
	} {
		if verdictOf(err) != "busy" {
			t.Errorf("%s: got %v", name, err)
		}
	}
}

// A wait for a key that is never released, for example by an abandoned session, ends within a bound.
func TestWaitsForLocksAreBounded(t *testing.T) {
	t.Parallel()
	db := setup(t)
	conn, err := db.Acquire(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Release()
	run := func(sql string) {
		t.Helper()
		if _, err := conn.Exec(context.WithoutCancel(t.Context()), sql); err != nil {
			t.Fatal(err)
		}
	}
	run(`BEGIN`)
	run(`INSERT INTO t VALUES (1)`)
	defer run(`ROLLBACK`)
	for what, fn := range map[string]func(tx pgx.Tx) error{"a statement": insert(t, 1), "a deferred value": deferring(1)} {
		began := time.Now()
		err := Transact(t.Context(), db, fn)
		if verdictOf(err) != "busy" {
			t.Errorf("%s: got %v after %s", what, err, time.Since(began))
		}
	}
}

// A function that leaves rows open is at fault, and nothing is written.
func TestCommittable(t *testing.T) {
	t.Parallel()
	for name, fn := range map[string]func(tx pgx.Tx) error{
		"rows left open": func(tx pgx.Tx) error {
			_, err := tx.Query(t.Context(), `SELECT generate_series(1, 1000)`)
			return err
		},
		"with a deferred value": func(tx pgx.Tx) error {
			_, err := tx.Query(t.Context(), `SELECT generate_series(1, 1000)`)
			return errors.Join(err, deferring(2)(tx))
		},
		"after a statement": func(tx pgx.Tx) error {
			if err := insert(t, 1)(tx); err != nil {
				return err
			}
			_, err := tx.Query(t.Context(), `SELECT generate_series(1, 1000)`)
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			db := setup(t)
			err := Transact(t.Context(), db, fn)
			if err == nil || verdictOf(err) != "own" || !strings.Contains(err.Error(), "rows of a query") {
				t.Errorf("got %v", err)
			}
			wantRows(t, db, 0)
			err = Transact(t.Context(), db, func(tx pgx.Tx) error {
				inner := Transact(Join(t.Context(), db, tx), db, fn)
				if inner == nil || !strings.Contains(inner.Error(), "rows of a query") {
					t.Errorf("inner transaction: got %v", inner)
				}
				return nil
			})
			if err == nil || errors.Is(err, ErrOutcomeUnknown) {
				t.Errorf("outer transaction: got %v", err)
			}
			wantRows(t, db, 0)
		})
	}
}

// After a migration changes the result of a prepared statement, the transaction runs again and the caller gets no
// error.
func TestPlansThatAMigrationMadeStale(t *testing.T) {
	t.Parallel()
	db := alter(t, setup(t), func(c *pgxpool.Config) { c.MaxConns = 1 })
	read := func() error {
		return Transact(t.Context(), db, func(tx pgx.Tx) error {
			rows, err := tx.Query(t.Context(), `SELECT * FROM t`)
			if err != nil {
				return err
			}
			rows.Close()
			return rows.Err()
		})
	}
	if err := read(); err != nil {
		t.Fatal(err)
	}
	exec(t, db, `ALTER TABLE t ADD added text`)
	if err := read(); err != nil {
		t.Error(err)
	}
}
