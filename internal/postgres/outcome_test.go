package postgres

import (
	"errors"
	"fmt"
	"net"
	"testing"
	"time"

	"example.com/shop/internal/dev/testenv"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
	"golang.org/x/sync/errgroup"
)

func TestUnknownOutcome(t *testing.T) {
	t.Parallel()

	t.Run("AnswerOfCommitLost", func(t *testing.T) {
		t.Parallel()
		db, faults := setup(t), new(losesCommit)
		lossy := alter(t, db, func(c *pgxpool.Config) { c.ConnConfig.DialFunc = faults.dial })
		faults.answer.Store(true)
		err := Transact(t.Context(), lossy, insert(t, 1))
		if !errors.Is(err, ErrOutcomeUnknown) || errors.Is(err, ErrUnavailable) {
			t.Errorf("got error %v", err)
		}
		wantRows(t, db, 1)
		if err := Transact(t.Context(), lossy, insert(t, 2)); err != nil {
			t.Errorf("afterwards: %v", err)
		}
	})

	// The caller cannot tell this case from the previous one, so the error must be the same.
	t.Run("CommitLostOnItsWay", func(t *testing.T) {
		t.Parallel()
		db, faults := setup(t), new(losesCommit)
		lossy := alter(t, db, func(c *pgxpool.Config) { c.ConnConfig.DialFunc = faults.dial })
		faults.request.Store(true)
		err := Transact(t.Context(), lossy, insert(t, 1))
		if !errors.Is(err, ErrOutcomeUnknown) || errors.Is(err, ErrUnavailable) {
			t.Errorf("got error %v", err)
		}
		wantRows(t, db, 0)
	})

	t.Run("TerminatedDuringCommit", func(t *testing.T) {
		t.Parallel()
		db := setup(t)
		atCommit(t, db, `PERFORM pg_terminate_backend(pg_backend_pid());`)
		if err := Transact(t.Context(), db, insert(t, 1)); !errors.Is(err, ErrOutcomeUnknown) {
			t.Errorf("got error %v", err)
		}
	})

	// COMMIT succeeds with a warning that it is on no standby. The test simulates that warning with one from a trigger.
	t.Run("WaitForTheStandbyCancelled", func(t *testing.T) {
		t.Parallel()
		plain := setup(t)
		atCommit(t, plain, `IF NEW.n % 2 = 1 THEN RAISE WARNING 'cancelled'; END IF;`)
		db := alter(t, plain, func(c *pgxpool.Config) {
			c.MaxConns = 1 // so that transactions reuse the connection
			c.ConnConfig.OnNotice = func(conn *pgconn.PgConn, notice *pgconn.Notice) {
				notice.Routine = "SyncRepWaitForLSN"
				noteCancelledSyncWait(conn, notice)
			}
		})
		var all errgroup.Group
		for n := range 40 {
			all.Go(func() error {
				err := Transact(t.Context(), db, insert(t, n))
				if errors.Is(err, ErrOutcomeUnknown) != (n%2 == 1) {
					return fmt.Errorf("transaction %d: got error %w", n, err)
				}
				return nil
			})
		}
		if err := all.Wait(); err != nil {
			t.Error(err)
		}
		exec(t, db, `INSERT INTO t VALUES (41)`) // outside Transact
		if err := Transact(t.Context(), db, insert(t, 42)); err != nil {
			t.Errorf("after another transaction's warning: %v", err)
		}
	})
}

func TestNoteCancelledSyncWait(t *testing.T) {
	t.Parallel()
	db := setup(t)
	conn, err := db.Acquire(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Release()
	raw := conn.Conn().PgConn()
	for _, other := range []pgconn.Notice{
		{Code: "01000", Routine: "exec_stmt_raise"},
		{Code: "00000", Routine: "SyncRepWaitForLSN"},
	} {
		noteCancelledSyncWait(raw, &other)
		if _, noted := raw.CustomData()[syncWaitCancelled]; noted {
			t.Errorf("recorded %+v", other)
		}
	}
	noteCancelledSyncWait(raw, &pgconn.Notice{Code: "01000", Routine: "SyncRepWaitForLSN"})
	if raw.CustomData()[syncWaitCancelled] != true {
		t.Error("did not record the warning")
	}
}

func TestUnavailable(t *testing.T) {
	t.Parallel()

	t.Run("Refused", func(t *testing.T) {
		t.Parallel()
		proxy, url := testenv.ProxyURL(t, testenv.PostgresURL(t))
		proxy.Refuse(true)
		wantUnavailable(t, open(t, Config{URL: url}), func(pgx.Tx) error { return nil })
	})

	t.Run("NoListener", func(t *testing.T) {
		t.Parallel()
		listener, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		listener.Close()
		db := open(t, Config{URL: "postgres://x:x@" + listener.Addr().String() + "/x"})
		wantUnavailable(t, db, func(pgx.Tx) error { return nil })
	})

	t.Run("BlackHole", func(t *testing.T) {
		t.Parallel()
		proxy, url := testenv.ProxyURL(t, testenv.PostgresURL(t))
		proxy.Freeze(true)
		db := open(t, Config{URL: url, ConnectTimeout: 100 * time.Millisecond})
		wantUnavailable(t, db, func(pgx.Tx) error { return nil })
	})

	t.Run("CutInTheMiddle", func(t *testing.T) {
		t.Parallel()
		proxy, url := testenv.ProxyURL(t, testenv.PostgresURL(t))
		db := open(t, Config{URL: url})
		exec(t, db, `CREATE TABLE t (n integer PRIMARY KEY)`)
		wantUnavailable(t, db, func(tx pgx.Tx) error {
			if err := insert(t, 1)(tx); err != nil {
				t.Errorf("insert: %v", err)
			}
			proxy.Cut()
			return insert(t, 2)(tx)
		})
		wantRows(t, db, 0)
	})

	t.Run("ConnectionAlreadyClosed", func(t *testing.T) {
		t.Parallel()
		db := setup(t)
		wantUnavailable(t, db, func(tx pgx.Tx) error {
			_ = tx.Conn().Close(t.Context())
			return insert(t, 1)(tx)
		})
	})

	t.Run("BackendTerminated", func(t *testing.T) {
		t.Parallel()
		wantUnavailable(t, setup(t), func(tx pgx.Tx) error {
			_, err := tx.Exec(t.Context(), `SELECT pg_terminate_backend(pg_backend_pid())`)
			return err
		})
	})

	t.Run("ReadOnly", func(t *testing.T) {
		t.Parallel()
		db := alter(t, setup(t), func(c *pgxpool.Config) {
			c.ConnConfig.RuntimeParams["default_transaction_read_only"] = "on"
		})
		wantUnavailable(t, db, insert(t, 1))
		wantRows(t, db, 0)
	})
}

func wantUnavailable(t *testing.T, db *pgxpool.Pool, fn func(tx pgx.Tx) error) {
	t.Helper()
	if err := Transact(t.Context(), db, fn); !errors.Is(err, ErrUnavailable) || errors.Is(err, ErrOutcomeUnknown) {
		t.Errorf("got error %v, want one that wraps ErrUnavailable", err)
	}
}

func TestOpen(t *testing.T) {
	t.Parallel()
	if _, err := Open(t.Context(), Config{URL: "postgres://[", MaxConns: 1}); err == nil {
		t.Error("opened an invalid URL")
	}
	db := open(t, Config{URL: testenv.PostgresURL(t), ApplicationName: "probe"})
	for setting, want := range map[string]string{
		"application_name": "probe", "idle_in_transaction_session_timeout": "1min",
	} {
		var got string
		if err := db.QueryRow(t.Context(), `SELECT current_setting($1)`, setting).Scan(&got); err != nil || got != want {
			t.Errorf("%s is %q, %v, want %q", setting, got, err, want)
		}
	}
	if n := db.Config().MaxConns; n != 10 {
		t.Errorf("pool of %d connections", n)
	}
}

// A single statement as a transaction reports its outcome as reliably as a transaction of several statements.
func TestTransactRow(t *testing.T) {
	t.Parallel()
	const sql = `INSERT INTO t SELECT $1 WHERE $1 >= 0 RETURNING n`
	row := func(db *pgxpool.Pool, n int) (got int, err error) {
		err = TransactRow(t.Context(), db, sql, []any{n}, &got)
		return got, err
	}
	db := setup(t)
	if got, err := row(db, 1); err != nil || got != 1 {
		t.Errorf("got %d, %v", got, err)
	}
	var refused *pgconn.PgError
	if _, err := row(db, 1); !errors.As(err, &refused) || errors.Is(err, ErrOutcomeUnknown) {
		t.Errorf("refused: got error %v", err)
	}
	if _, err := row(db, -1); !errors.Is(err, pgx.ErrNoRows) || errors.Is(err, ErrOutcomeUnknown) {
		t.Errorf("no row: got error %v", err)
	}
	atCommit(t, db, `IF NEW.n = 2 THEN PERFORM pg_terminate_backend(pg_backend_pid());
		ELSIF NEW.n = 3 THEN RAISE 'no'; ELSE RAISE WARNING 'cancelled'; END IF;`)
	if _, err := row(db, 2); !errors.Is(err, ErrOutcomeUnknown) {
		t.Errorf("terminated during commit: got error %v", err)
	}
	if _, err := row(db, 3); !errors.As(err, &refused) || errors.Is(err, ErrOutcomeUnknown) {
		t.Errorf("refused at commit: got error %v", err)
	}
	warned := alter(t, db, func(c *pgxpool.Config) {
		c.ConnConfig.OnNotice = func(conn *pgconn.PgConn, notice *pgconn.Notice) {
			notice.Routine = "SyncRepWaitForLSN"
			noteCancelledSyncWait(conn, notice)
		}
	})
	if _, err := row(warned, 4); !errors.Is(err, ErrOutcomeUnknown) {
		t.Errorf("wait for the standby cancelled: got error %v", err)
	}
	proxy, url := testenv.ProxyURL(t, testenv.PostgresURL(t))
	proxy.Refuse(true)
	_, err := row(open(t, Config{URL: url}), 5)
	if !errors.Is(err, ErrUnavailable) || errors.Is(err, ErrOutcomeUnknown) {
		t.Errorf("database down: got error %v", err)
	}
	wantRows(t, db, 2)
}
