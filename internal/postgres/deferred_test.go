package postgres

import (
	"errors"
	"slices"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
)

// numbers inserts its values into t in one statement, which fails if a value is negative.
var numbers = Deferred[int]{Queue: func(_ *pgx.Conn, batch *pgx.Batch, values []int) {
	batch.Queue(`INSERT INTO t SELECT sqrt(n) * sqrt(n) FROM unnest($1::int[]) AS n`, values)
}}

func deferring(values ...int) func(tx pgx.Tx) error {
	return func(tx pgx.Tx) error {
		added, err := numbers.Add(tx, values...)
		if err == nil && !added {
			err = errors.New("not a transaction of Transact")
		}
		return err
	}
}

func TestDeferred(t *testing.T) {
	t.Parallel()
	// nested and joined add values in a savepoint, made by Begin and by Join. The values share its fate.
	nested := func(tx pgx.Tx, undo bool, values ...int) error {
		savepoint, err := tx.Begin(t.Context())
		if err != nil {
			return err
		}
		if err := deferring(values...)(savepoint); err != nil {
			return err
		}
		if undo {
			return savepoint.Rollback(t.Context())
		}
		return savepoint.Commit(t.Context())
	}
	joined := func(db *pgxpool.Pool, tx pgx.Tx, outcome error, values ...int) error {
		err := Transact(Join(t.Context(), db, tx), db, func(tx pgx.Tx) error {
			return errors.Join(deferring(values...)(tx), outcome)
		})
		if !errors.Is(err, outcome) {
			t.Errorf("nested: %v", err)
		}
		return nil
	}
	for name, test := range map[string]struct {
		fn   func(db *pgxpool.Pool, tx pgx.Tx) error
		want error
		rows []int
	}{
		"commit": {func(_ *pgxpool.Pool, tx pgx.Tx) error {
			return errors.Join(deferring(1, 2)(tx), deferring(3)(tx))
		}, nil, []int{1, 2, 3}},
		"rollback": {func(_ *pgxpool.Pool, tx pgx.Tx) error {
			return errors.Join(deferring(1)(tx), errProbe)
		}, errProbe, nil},
		"refused": {func(_ *pgxpool.Pool, tx pgx.Tx) error {
			return errors.Join(insert(t, 1)(tx), deferring(-1)(tx))
		}, new(pgconn.PgError), nil},
		"savepoint": {func(_ *pgxpool.Pool, tx pgx.Tx) error {
			return errors.Join(nested(tx, false, 1), deferring(2)(tx))
		}, nil, []int{1, 2}},
		"savepoint undone": {func(_ *pgxpool.Pool, tx pgx.Tx) error {
			return errors.Join(nested(tx, true, 1), deferring(2)(tx))
		}, nil, []int{2}},
		"join": {func(db *pgxpool.Pool, tx pgx.Tx) error {
			return errors.Join(joined(db, tx, nil, 1), deferring(2)(tx))
		}, nil, []int{1, 2}},
		"join that fails": {func(db *pgxpool.Pool, tx pgx.Tx) error {
			return errors.Join(joined(db, tx, errProbe, 1), deferring(2)(tx))
		}, nil, []int{2}},
		"failed before": {func(_ *pgxpool.Pool, tx pgx.Tx) error {
			_, _ = tx.Exec(t.Context(), `SELECT 1 / 0`)
			return deferring(1)(tx)
		}, pgx.ErrTxCommitRollback, nil},
		"refused and undone": {func(_ *pgxpool.Pool, tx pgx.Tx) error {
			return errors.Join(nested(tx, true, -1), deferring(2)(tx))
		}, nil, []int{2}},
		"nothing was deferred": {func(_ *pgxpool.Pool, tx pgx.Tx) error { return insert(t, 1)(tx) }, nil, []int{1}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			// One connection, so that leftovers on it would show.
			db := alter(t, setup(t), func(c *pgxpool.Config) { c.MaxConns = 1 })
			for range 2 {
				exec(t, db, `TRUNCATE t`)
				err := Transact(t.Context(), db, func(tx pgx.Tx) error { return test.fn(db, tx) })
				var refused *pgconn.PgError
				if !errors.Is(err, test.want) && !(errors.As(test.want, &refused) && errors.As(err, &refused)) {
					t.Errorf("got error %v, want %v", err, test.want)
				}
				rows, err := db.Query(t.Context(), `SELECT n FROM t ORDER BY n`)
				if err != nil {
					t.Fatal(err)
				}
				got, err := pgx.CollectRows(rows, pgx.RowTo[int])
				if err != nil || !slices.Equal(got, test.rows) {
					t.Errorf("got rows %v, %v, want %v", got, err, test.rows)
				}
			}
			wantRows(t, db, len(test.rows))
			if n := db.Stat().NewConnsCount(); n != 1 {
				t.Errorf("%d connections were made: one could not be reused", n)
			}
		})
	}
}

// A COMMIT with deferred statements ends like any other: an unknown outcome is reported as such, and conflicts are
// retried.
func TestDeferredCommitEndsLikeAnyOther(t *testing.T) {
	t.Parallel()
	t.Run("AnswerLost", func(t *testing.T) {
		t.Parallel()
		db, faults := setup(t), new(losesCommit)
		lossy := alter(t, db, func(c *pgxpool.Config) { c.ConnConfig.DialFunc = faults.dial })
		faults.answer.Store(true)
		err := Transact(t.Context(), lossy, deferring(1))
		if !errors.Is(err, ErrOutcomeUnknown) || errors.Is(err, ErrUnavailable) {
			t.Errorf("got error %v", err)
		}
		wantRows(t, db, 1)
	})
	t.Run("Terminated", func(t *testing.T) {
		t.Parallel()
		db := setup(t)
		atCommit(t, db, `PERFORM pg_terminate_backend(pg_backend_pid());`)
		if err := Transact(t.Context(), db, deferring(1)); !errors.Is(err, ErrOutcomeUnknown) {
			t.Errorf("got error %v", err)
		}
	})
	t.Run("DiskFull", func(t *testing.T) {
		t.Parallel()
		db := setup(t)
		exec(t, db, `CREATE FUNCTION no_room() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
			RAISE 'full' USING ERRCODE = '53100'; END $$`)
		exec(t, db, `CREATE TRIGGER no_room BEFORE INSERT ON t FOR EACH ROW EXECUTE FUNCTION no_room()`)
		err := Transact(t.Context(), db, deferring(1))
		if !errors.Is(err, ErrUnavailable) || errors.Is(err, ErrOutcomeUnknown) {
			t.Errorf("got error %v", err)
		}
	})
	t.Run("Conflict", func(t *testing.T) {
		t.Parallel()
		db, runs := setup(t), 0
		exec(t, db, `CREATE SEQUENCE tries`)
		exec(t, db, `CREATE FUNCTION conflict() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
			IF nextval('tries') < 3 THEN RAISE 'conflict' USING ERRCODE = '40P01'; END IF; RETURN NEW; END $$`)
		exec(t, db, `CREATE TRIGGER conflict BEFORE INSERT ON t FOR EACH ROW EXECUTE FUNCTION conflict()`)
		err := Transact(t.Context(), db, func(tx pgx.Tx) error {
			runs++
			return deferring(1)(tx)
		})
		if err != nil || runs != 3 {
			t.Errorf("got error %v after %d runs", err, runs)
		}
		wantRows(t, db, 1)
	})
	// The modes for poolers, in which nothing is prepared.
	for _, mode := range []pgx.QueryExecMode{
		pgx.QueryExecModeCacheDescribe, pgx.QueryExecModeDescribeExec, pgx.QueryExecModeExec,
		pgx.QueryExecModeSimpleProtocol,
	} {
		t.Run(mode.String(), func(t *testing.T) {
			t.Parallel()
			db := setup(t)
			pooled := alter(t, db, func(c *pgxpool.Config) { c.ConnConfig.DefaultQueryExecMode, c.MaxConns = mode, 1 })
			var refused *pgconn.PgError
			if err := Transact(t.Context(), pooled, deferring(-1)); !errors.As(err, &refused) {
				t.Errorf("refused: got error %v", err)
			}
			if err := Transact(t.Context(), pooled, deferring(1, 2)); err != nil {
				t.Error(err)
			}
			wantRows(t, db, 2)
		})
	}
}
