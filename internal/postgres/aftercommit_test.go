package postgres

import (
	"errors"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
)

// Transact calls AfterCommit's functions once the change is visible, and only if it may be visible.
func TestAfterCommit(t *testing.T) {
	t.Parallel()
	db, faults := setup(t), new(losesCommit)
	lossy := alter(t, db, func(c *pgxpool.Config) { c.ConnConfig.DialFunc, c.MaxConns = faults.dial, 1 })
	calls, runs := 0, 0
	transact := func(n int, outcome error) error {
		return Transact(t.Context(), lossy, func(tx pgx.Tx) error {
			runs++
			AfterCommit(tx, func() {
				calls++
				wantRows(t, db, n)
			})
			if err := insert(t, n)(tx); err != nil {
				return err
			}
			return outcome
		})
	}
	if err := transact(1, errProbe); !errors.Is(err, errProbe) || calls != 0 {
		t.Errorf("rolled back: %v, %d calls", err, calls)
	}
	if err := transact(1, nil); err != nil || calls != 1 {
		t.Errorf("committed: %v, %d calls, want 1: the rolled back transaction's call must not run", err, calls)
	}
	faults.answer.Store(true)
	if err := transact(2, nil); !errors.Is(err, ErrOutcomeUnknown) || calls != 2 {
		t.Errorf("outcome unknown: %v, %d calls", err, calls)
	}
	runs = 0
	if err := transact(3, &pgconn.PgError{Code: "40001"}); err == nil || runs != maxRuns || calls != 2 {
		t.Errorf("conflict: %v, %d runs, %d calls", err, runs, calls)
	}
	runs = 0
	err := Transact(t.Context(), db, func(tx pgx.Tx) error {
		AfterCommit(tx, func() { calls++ })
		if runs++; runs == 1 {
			return &pgconn.PgError{Code: "40P01"}
		}
		return insert(t, 4)(tx)
	})
	if err != nil || runs != 2 || calls != 3 {
		t.Errorf("run again: %v, %d runs, %d calls", err, runs, calls)
	}
}

func TestAfterCommitWantsTransact(t *testing.T) {
	t.Parallel()
	db := setup(t)
	tx, err := db.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if recover() == nil {
			t.Error("no panic")
		}
		if err := tx.Rollback(t.Context()); err != nil {
			t.Error(err)
		}
	}()
	AfterCommit(tx, func() {})
}
