package postgres

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"example.com/shop/internal/dev/testenv"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"golang.org/x/sync/errgroup"
)

var errProbe = errors.New("probe")

func TestTransactCommitsOrRollsBack(t *testing.T) {
	t.Parallel()
	db := setup(t)
	if err := Transact(t.Context(), db, insert(t, 1)); err != nil {
		t.Errorf("transact: %v", err)
	}
	wantRows(t, db, 1)
	made := db.Stat().NewConnsCount()
	err := Transact(t.Context(), db, func(tx pgx.Tx) error {
		if err := insert(t, 2)(tx); err != nil {
			return err
		}
		return errProbe
	})
	if !errors.Is(err, errProbe) || errors.Is(err, ErrUnavailable) || errors.Is(err, ErrOutcomeUnknown) {
		t.Errorf("got error %v, want that of the function", err)
	}
	wantRows(t, db, 1)
	if n := db.Stat().NewConnsCount(); n != made {
		t.Error("the connection was closed")
	}
}

func TestTransactPassesPanicsOn(t *testing.T) {
	t.Parallel()
	db := setup(t)
	for name, before := range map[string]func(tx pgx.Tx) error{
		"idle":    insert(t, 1),
		"aborted": func(tx pgx.Tx) error { _, err := tx.Exec(t.Context(), `SELECT 1 / 0`); return err },
		"busy": func(tx pgx.Tx) error {
			_, err := tx.Query(t.Context(), `SELECT generate_series(1, 100000)`)
			return err
		},
	} {
		func() {
			defer func() {
				if cause := recover(); cause != any(errProbe) {
					t.Errorf("%s: panicked with %v", name, cause)
				}
			}()
			err := Transact(t.Context(), db, func(tx pgx.Tx) error {
				_ = before(tx)
				panic(errProbe)
			})
			t.Errorf("%s: returned %v", name, err)
		}()
		wantRows(t, db, 0)
	}
	if err := Transact(t.Context(), db, insert(t, 1)); err != nil {
		t.Errorf("afterwards: %v", err)
	}
}

func TestTransactRunsAgainAfterConflicts(t *testing.T) {
	t.Parallel()

	t.Run("UpToThreeTimes", func(t *testing.T) {
		t.Parallel()
		db := setup(t)
		for _, code := range []string{"40001", "40P01"} {
			for _, conflicts := range []int{maxRuns - 1, maxRuns + 1} {
				runs, n := 0, 10*conflicts+int(code[2])
				err := Transact(t.Context(), db, func(tx pgx.Tx) error {
					if err := insert(t, n)(tx); err != nil { // fails if an earlier run's insert is still there
						return err
					}
					if runs++; runs <= conflicts {
						_, err := tx.Exec(t.Context(), fmt.Sprintf(`DO $$ BEGIN RAISE SQLSTATE '%s'; END $$`, code))
						return err
					}
					return nil
				})
				if (err == nil) != (conflicts < maxRuns) || isConflict(err) != (conflicts >= maxRuns) ||
					runs != maxRuns {
					t.Errorf("%s, %d times: %d runs, error %v", code, conflicts, runs, err)
				}
			}
		}
		wantRows(t, db, 2)
	})

	t.Run("AlsoIfTheyShowAtCommit", func(t *testing.T) {
		t.Parallel()
		db := setup(t)
		exec(t, db, `CREATE SEQUENCE runs`) // a rollback does not undo nextval
		atCommit(t, db, `IF nextval('runs') < 3 THEN RAISE serialization_failure; END IF;`)
		if err := Transact(t.Context(), db, insert(t, 1)); err != nil {
			t.Errorf("transact: %v", err)
		}
		wantRows(t, db, 1)
	})

	t.Run("AfterADeadlock", func(t *testing.T) {
		t.Parallel()
		db := setup(t)
		exec(t, db, `INSERT INTO t VALUES (1), (2)`)
		locked := make(chan struct{}, 2)
		both := make(chan struct{})
		lock := func(first, second int) func() error {
			runs := 0
			return func() error {
				return Transact(t.Context(), db, func(tx pgx.Tx) error {
					if _, err := tx.Exec(t.Context(), `UPDATE t SET n = n WHERE n = $1`, first); err != nil {
						return err
					}
					if runs++; runs == 1 {
						locked <- struct{}{}
						<-both
					}
					_, err := tx.Exec(t.Context(), `UPDATE t SET n = n WHERE n = $1`, second)
					return err
				})
			}
		}
		var all errgroup.Group
		all.Go(lock(1, 2))
		all.Go(lock(2, 1))
		<-locked
		<-locked
		close(both)
		if err := all.Wait(); err != nil {
			t.Errorf("transact: %v", err)
		}
	})

	t.Run("NotWhenTheCallerHasLeft", func(t *testing.T) {
		t.Parallel()
		db := setup(t)
		ctx, cancel := context.WithCancel(t.Context())
		runs := 0
		err := Transact(ctx, db, func(tx pgx.Tx) error {
			runs++
			_, err := tx.Exec(ctx, `DO $$ BEGIN RAISE serialization_failure; END $$`)
			cancel()
			return err
		})
		if !isConflict(err) || runs != 1 {
			t.Errorf("%d runs, error %v", runs, err)
		}
	})
}

func TestTransactAndTheCallersContext(t *testing.T) {
	t.Parallel()

	t.Run("CancelledBeforeCommitWritesNothing", func(t *testing.T) {
		t.Parallel()
		db := setup(t)
		ctx, cancel := context.WithCancel(t.Context())
		err := Transact(ctx, db, func(tx pgx.Tx) error { defer cancel(); return insert(t, 1)(tx) })
		if !errors.Is(err, context.Canceled) || errors.Is(err, ErrOutcomeUnknown) {
			t.Errorf("got error %v", err)
		}
		wantRows(t, db, 0)
		if err := Transact(ctx, db, insert(t, 1)); !errors.Is(err, context.Canceled) || errors.Is(err, ErrUnavailable) {
			t.Errorf("from the start: got error %v", err)
		}
	})

	t.Run("CancelledDuringCommitCommits", func(t *testing.T) {
		t.Parallel()
		db := setup(t)
		atCommit(t, db, `PERFORM pg_advisory_xact_lock(1);`)
		holder, err := db.Begin(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = holder.Rollback(context.Background()) }()
		if _, err := holder.Exec(t.Context(), `SELECT pg_advisory_xact_lock(1)`); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- Transact(ctx, db, insert(t, 1)) }()
		testenv.Eventually(t, 10*time.Second, func() error {
			var waiting bool
			err := db.QueryRow(t.Context(), `
				SELECT EXISTS (
					SELECT FROM pg_locks WHERE locktype = 'advisory' AND NOT granted
					AND database = (SELECT oid FROM pg_database WHERE datname = current_database()))`).Scan(&waiting)
			if err == nil && !waiting {
				err = errors.New("COMMIT does not wait yet")
			}
			return err
		})
		cancel()
		select {
		case err := <-done:
			t.Fatalf("COMMIT was interrupted: %v", err)
		case <-time.After(100 * time.Millisecond): // there is no event for "still waiting"
		}
		if err := holder.Commit(t.Context()); err != nil {
			t.Fatal(err)
		}
		if err := <-done; err != nil {
			t.Errorf("transact: %v", err)
		}
		wantRows(t, db, 1)
	})
}

func TestDefiniteErrorsOfCommit(t *testing.T) {
	t.Parallel()

	t.Run("DeferredConstraint", func(t *testing.T) {
		t.Parallel()
		db := setup(t)
		exec(t, db, `CREATE TABLE child (n integer REFERENCES t DEFERRABLE INITIALLY DEFERRED)`)
		err := Transact(t.Context(), db, func(tx pgx.Tx) error {
			if err := insert(t, 1)(tx); err != nil {
				return err
			}
			_, err := tx.Exec(t.Context(), `INSERT INTO child VALUES (2)`)
			return err
		})
		var refused *pgconn.PgError
		if !errors.As(err, &refused) || refused.Code != "23503" || errors.Is(err, ErrOutcomeUnknown) {
			t.Errorf("got error %v, want the foreign key's", err)
		}
		wantRows(t, db, 0)
	})

	t.Run("TransactionWasAborted", func(t *testing.T) {
		t.Parallel()
		db := setup(t)
		err := Transact(t.Context(), db, func(tx pgx.Tx) error {
			if err := insert(t, 1)(tx); err != nil {
				return err
			}
			_ = insert(t, 1)(tx)
			return nil // COMMIT answers ROLLBACK, which is no error to Postgres
		})
		if !errors.Is(err, pgx.ErrTxCommitRollback) || errors.Is(err, ErrOutcomeUnknown) {
			t.Errorf("got error %v", err)
		}
		wantRows(t, db, 0)
	})

	t.Run("LockTimeoutLeavesAUsableConnection", func(t *testing.T) {
		t.Parallel()
		db := setup(t)
		holder, err := db.Begin(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = holder.Rollback(context.Background()) }()
		if err := insert(t, 1)(holder); err != nil {
			t.Fatal(err)
		}
		err = Transact(t.Context(), db, func(tx pgx.Tx) error {
			if _, err := tx.Exec(t.Context(), `SET LOCAL lock_timeout = '10ms'`); err != nil {
				return err
			}
			return insert(t, 1)(tx)
		})
		var refused *pgconn.PgError
		if !errors.As(err, &refused) || refused.Code != "55P03" {
			t.Errorf("got error %v, want a lock timeout", err)
		}
		if err := holder.Rollback(t.Context()); err != nil {
			t.Fatal(err)
		}
		wantRows(t, db, 0)
	})
}
