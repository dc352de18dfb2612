package postgres

import (
	"errors"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

func TestAJoinedTransactionSharesTheFateOfTheOther(t *testing.T) {
	t.Parallel()
	for name, outcome := range map[string]error{"Commit": nil, "Rollback": errProbe} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			db := setup(t)
			err := Transact(t.Context(), db, func(tx pgx.Tx) error {
				ctx := Join(t.Context(), db, tx)
				for n := range 2 {
					if err := Transact(ctx, db, insert(t, n)); err != nil {
						t.Error(err)
					}
				}
				var elsewhere int
				if err := db.QueryRow(ctx, `SELECT count(*) FROM t`).Scan(&elsewhere); err != nil || elsewhere != 0 {
					t.Errorf("another connection sees %d rows before the commit, %v", elsewhere, err)
				}
				return outcome
			})
			if !errors.Is(err, outcome) {
				t.Errorf("ended with %v", err)
			}
			if outcome == nil {
				wantRows(t, db, 2)
			} else {
				wantRows(t, db, 0)
			}
		})
	}
}

// A joined transaction that fails undoes only its own writes, and the outer transaction continues.
func TestAJoinedTransactionFailsAlone(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		end  func(tx pgx.Tx) error
		want error
	}{
		"error": {func(pgx.Tx) error { return errProbe }, errProbe},
		"statement": {func(tx pgx.Tx) error {
			_, err := tx.Exec(t.Context(), `SELECT 1 / 0`)
			return err
		}, new(pgconn.PgError)},
		"swallowed error": {func(tx pgx.Tx) error {
			_, _ = tx.Exec(t.Context(), `SELECT 1 / 0`)
			return nil
		}, pgx.ErrTxCommitRollback},
		"panic": {func(pgx.Tx) error { panic(errProbe) }, errProbe},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			db := setup(t)
			err := Transact(t.Context(), db, func(tx pgx.Tx) error {
				ctx := Join(t.Context(), db, tx)
				if err := Transact(ctx, db, insert(t, 1)); err != nil {
					return err
				}
				err := recovered(func() error {
					return Transact(ctx, db, func(tx pgx.Tx) error {
						if err := insert(t, 2)(tx); err != nil {
							return err
						}
						return test.end(tx)
					})
				})
				var refused *pgconn.PgError
				if !errors.Is(err, test.want) && !(errors.As(test.want, &refused) && errors.As(err, &refused)) {
					t.Errorf("failed with %v, want %v", err, test.want)
				}
				return Transact(ctx, db, func(tx pgx.Tx) error { // nested
					return Transact(ctx, db, insert(t, 3))
				})
			})
			if err != nil {
				t.Error(err)
			}
			wantRows(t, db, 2)
		})
	}
}

// recovered calls fn. If fn panics with an error, recovered returns it.
func recovered(fn func() error) (err error) {
	defer func() {
		if cause, ok := recover().(error); ok {
			err = cause
		}
	}()
	return fn()
}

func TestOtherPoolsDoNotJoin(t *testing.T) {
	t.Parallel()
	db := setup(t)
	other := open(t, Config{URL: db.Config().ConnString()})
	err := Transact(t.Context(), db, func(tx pgx.Tx) error {
		if err := Transact(Join(t.Context(), db, tx), other, insert(t, 1)); err != nil {
			t.Error(err)
		}
		return errProbe
	})
	if !errors.Is(err, errProbe) {
		t.Error(err)
	}
	wantRows(t, db, 1)
}
