package outbox

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	"example.com/shop/internal/changes"
	"example.com/shop/internal/dev/testenv"
	"example.com/shop/internal/postgres"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"google.golang.org/protobuf/types/known/wrapperspb"
	"pgregory.net/rapid"
)

// action is a step of a transaction. handle selects one of the transactions and savepoints made so far, open or not.
type action struct {
	do     string
	handle int
	key    string
	// body and fails are set only for a join: the actions in it, and whether it fails after them.
	body  []action
	fails bool
}

var (
	writes  = []string{"row", "insert", "schedule", "latest", "after", "touch"}
	nesting = []string{"begin", "begin", "commit", "rollback", "join", "join in join"}
)

func actions(t *rapid.T, depth int) []action {
	all := make([]action, rapid.IntRange(0, 6).Draw(t, "actions"))
	for i := range all {
		all[i] = action{
			do:     rapid.SampledFrom(append(slices.Clone(writes), nesting...)).Draw(t, "do"),
			handle: rapid.IntRange(0, 5).Draw(t, "handle"),
			key:    rapid.SampledFrom([]string{"a", "b"}).Draw(t, "key"),
		}
		if all[i].do == "join" || all[i].do == "join in join" {
			if depth == 0 {
				all[i].do = "insert"
				continue
			}
			all[i].fails = rapid.Bool().Draw(t, "fails")
			all[i].body = actions(t, depth-1)
		}
	}
	return all
}

// world runs actions. The test has two. One writes everything immediately, and Postgres decides what stays. The other
// defers messages and functions until the commit.
type world struct {
	begin func(ctx context.Context, tx pgx.Tx, fn func(ctx context.Context, tx pgx.Tx) error) error
	after func(ctx context.Context, tx pgx.Tx, touch bool, n int) error

	root    pgx.Tx
	handles []pgx.Tx
	n       int
	closed  []bool // for each action, whether its transaction was closed
}

var errFails = errors.New("fails")

func (w *world) run(ctx context.Context, all []action) error {
	for _, step := range all {
		w.n++
		tx := w.handles[step.handle%len(w.handles)]
		err := w.do(ctx, tx, step)
		w.closed = append(w.closed, errors.Is(err, pgx.ErrTxClosed))
	}
	return nil
}

func (w *world) do(ctx context.Context, tx pgx.Tx, step action) error {
	message := probe(step.key, fmt.Sprint(w.n))
	switch step.do {
	case "row":
		_, err := tx.Exec(ctx, `INSERT INTO t VALUES ($1)`, w.n)
		return err
	case "insert":
		return Insert(ctx, tx, message)
	case "schedule":
		return Schedule(ctx, tx, time.Now().Add(time.Hour), message)
	case "latest":
		return InsertLatest(ctx, tx, time.Hour, message)
	case "after", "touch":
		return w.after(ctx, tx, step.do == "touch", w.n)
	case "begin":
		savepoint, err := tx.Begin(ctx)
		if err == nil {
			w.handles = append(w.handles, savepoint)
		}
		return err
	case "commit", "rollback":
		if tx == w.root {
			return nil // ends after the last action
		}
		if step.do == "commit" {
			return tx.Commit(ctx)
		}
		return tx.Rollback(ctx)
	}
	if step.do == "join in join" {
		tx = w.root // the transaction in the handler's context
	}
	return w.begin(ctx, tx, func(ctx context.Context, inner pgx.Tx) error {
		w.handles = append(w.handles, inner)
		err := w.run(ctx, step.body)
		if step.fails {
			err = errFails
		}
		return err
	})
}

// A transaction leaves the same result as if it had written everything immediately, with any nesting of savepoints.
func TestDeferredMessagesFollowSavepoints(t *testing.T) {
	t.Parallel()
	db := testenv.Postgres(t)
	exec(t, db, `CREATE TABLE t (n integer); CREATE TABLE after (n integer, position bigint GENERATED ALWAYS AS IDENTITY)`)
	hub := changes.New(changes.Config{})
	read := func(context.Context, []string) (map[string]*wrapperspb.StringValue, error) { return nil, nil }
	topic := changes.NewTopic(hub, "savepoints", read)
	rapid.Check(t, func(rt *rapid.T) {
		program, fails := actions(rt, 3), rapid.Bool().Draw(rt, "fails")
		immediate := &world{begin: func(ctx context.Context, tx pgx.Tx, fn func(context.Context, pgx.Tx) error) error {
			return immediately(ctx, tx, fn)
		}, after: func(ctx context.Context, tx pgx.Tx, _ bool, n int) error {
			_, err := tx.Exec(ctx, `INSERT INTO after (n) VALUES ($1)`, n)
			return err
		}}
		wantErr := pgx.BeginFunc(t.Context(), db, func(tx pgx.Tx) error {
			return immediate.whole(t.Context(), tx, program, fails)
		})
		want := results(t, db)
		exec(t, db, `TRUNCATE outbox, outbox_scheduled, t, after`)

		var called []int
		deferred := &world{begin: func(ctx context.Context, tx pgx.Tx, fn func(context.Context, pgx.Tx) error) error {
			ctx = postgres.Join(ctx, db, tx)
			return postgres.Transact(ctx, db, func(tx pgx.Tx) error { return fn(ctx, tx) })
		}, after: func(ctx context.Context, tx pgx.Tx, touch bool, n int) error {
			if _, err := tx.Exec(ctx, `SELECT 1`); err != nil {
				return err // AfterCommit panics if the transaction is closed
			}
			if touch {
				topic.Touch(tx, "key")
			}
			postgres.AfterCommit(tx, func() { called = append(called, n) })
			return nil
		}}
		err := postgres.Transact(t.Context(), db, func(tx pgx.Tx) error {
			return deferred.whole(t.Context(), tx, program, fails)
		})
		got := results(t, db)
		exec(t, db, `TRUNCATE outbox, outbox_scheduled, t, after`)

		got["after"] = nil
		for _, n := range called {
			got["after"] = append(got["after"], fmt.Sprint(n))
		}
		if (err == nil) != (wantErr == nil) || !slices.Equal(deferred.closed, immediate.closed) {
			rt.Fatalf("deferred: error %v, closed %v; immediate: error %v, closed %v",
				err, deferred.closed, wantErr, immediate.closed)
		}
		for what := range want {
			if !slices.Equal(got[what], want[what]) {
				rt.Fatalf("%s: deferred %v, immediate %v", what, got[what], want[what])
			}
		}
	})
}

// whole runs a program as an entire transaction.
func (w *world) whole(ctx context.Context, tx pgx.Tx, program []action, fails bool) error {
	w.root, w.handles, w.n, w.closed = tx, []pgx.Tx{tx}, 0, nil
	if err := w.run(ctx, program); err != nil || !fails {
		return err
	}
	return errFails
}

// immediately is Transact within tx without deferring.
func immediately(ctx context.Context, tx pgx.Tx, fn func(context.Context, pgx.Tx) error) error {
	savepoint, err := tx.Begin(ctx)
	if err != nil {
		return err
	}
	if err = fn(ctx, savepoint); err == nil && tx.Conn().PgConn().TxStatus() == 'E' {
		err = pgx.ErrTxCommitRollback
	}
	if err != nil {
		_ = savepoint.Rollback(ctx)
		return err
	}
	return savepoint.Commit(ctx)
}

// results returns everything that a transaction wrote, in order.
func results(t *testing.T, db *pgxpool.Pool) map[string][]string {
	t.Helper()
	left := map[string][]string{}
	for what, sql := range map[string]string{
		"t":                `SELECT n::text FROM t ORDER BY ctid`,
		"after":            `SELECT n::text FROM after ORDER BY position`,
		"outbox":           `SELECT key || ' ' || encode(payload, 'hex') FROM outbox ORDER BY id`,
		"outbox_scheduled": `SELECT latest || ' ' || key || ' ' || encode(payload, 'hex') FROM outbox_scheduled ORDER BY 1`,
	} {
		rows, err := db.Query(t.Context(), sql)
		if err != nil {
			t.Fatal(err)
		}
		if left[what], err = pgx.CollectRows(rows, pgx.RowTo[string]); err != nil {
			t.Fatal(err)
		}
	}
	return left
}

// A failed rollback undoes nothing: the savepoint was removed with an outer one, and messages inserted since then stay.
func TestAFailedRollbackForgetsNothing(t *testing.T) {
	t.Parallel()
	db := testenv.Postgres(t)
	err := postgres.Transact(t.Context(), db, func(tx pgx.Tx) error {
		outer, err := tx.Begin(t.Context())
		if err != nil {
			return err
		}
		inner, err := tx.Begin(t.Context())
		if err != nil {
			return err
		}
		if err := outer.Rollback(t.Context()); err != nil {
			return err
		}
		if err := Insert(t.Context(), inner, probe("key", "kept")); err != nil {
			return err
		}
		err = postgres.Transact(postgres.Join(t.Context(), db, tx), db, func(pgx.Tx) error {
			return inner.Rollback(t.Context())
		})
		if err == nil {
			return errors.New("the rollback did not fail: the test proves nothing")
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	var kept int
	if err := db.QueryRow(t.Context(), `SELECT count(*) FROM outbox`).Scan(&kept); err != nil || kept != 1 {
		t.Errorf("%d messages are left (%v), want 1", kept, err)
	}
}

// A message that Insert accepts is in the log once its transaction has committed. So Insert, like any statement, fails
// in a transaction that has ended.
func TestInsertIntoAnEndedTransaction(t *testing.T) {
	t.Parallel()
	db := testenv.Postgres(t)
	refused := func(name string, tx pgx.Tx) {
		t.Helper()
		if err := Insert(t.Context(), tx, probe("k", name)); !errors.Is(err, pgx.ErrTxClosed) {
			t.Errorf("%s: got error %v", name, err)
		}
	}
	var ended pgx.Tx
	err := postgres.Transact(t.Context(), db, func(tx pgx.Tx) error {
		ended = tx
		for _, end := range []func(tx pgx.Tx) error{
			func(tx pgx.Tx) error { return tx.Commit(t.Context()) },
			func(tx pgx.Tx) error { return tx.Rollback(t.Context()) },
		} {
			savepoint, err := tx.Begin(t.Context())
			if err != nil {
				return err
			}
			if err := end(savepoint); err != nil {
				return err
			}
			refused("savepoint", savepoint)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	refused("committed", ended)
	_ = postgres.Transact(t.Context(), db, func(tx pgx.Tx) error { ended = tx; return errFails })
	refused("rolled back", ended)
	if left := newReader(db).all(t); len(left) > 0 {
		t.Errorf("left %v", left)
	}
}
