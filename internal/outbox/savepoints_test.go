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

// action is a step of a transaction. Handle chooses among the transactions and savepoints made so far, open or not.
type action struct {
	do     string
	handle int
	key    string
	// Of a join: what is done in it, and whether it fails in the end.
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

// world runs actions. There are two: in one everything is written at once, and Postgres decides what stays; in the
// other messages and functions wait for the commit.
type world struct {
	begin func(ctx context.Context, tx pgx.Tx, fn func(ctx context.Context, tx pgx.Tx) error) error
	after func(ctx context.Context, tx pgx.Tx, touch bool, n int) error

	root    pgx.Tx
	handles []pgx.Tx
	n       int
	closed  []bool // an action: whether it found its transaction closed
}

var errFails = errors.New("fails")

func (w *world) run(ctx context.Context, all []action) error {
	for _, one := range all {
		w.n++
		tx := w.handles[one.handle%len(w.handles)]
		err := w.do(ctx, tx, one)
		w.closed = append(w.closed, errors.Is(err, pgx.ErrTxClosed))
	}
	return nil
}

func (w *world) do(ctx context.Context, tx pgx.Tx, one action) error {
	message := probe(one.key, fmt.Sprint(w.n))
	switch one.do {
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
		return w.after(ctx, tx, one.do == "touch", w.n)
	case "begin":
		savepoint, err := tx.Begin(ctx)
		if err == nil {
			w.handles = append(w.handles, savepoint)
		}
		return err
	case "commit", "rollback":
		if tx == w.root {
			return nil // ends by itself
		}
		if one.do == "commit" {
			return tx.Commit(ctx)
		}
		return tx.Rollback(ctx)
	}
	if one.do == "join in join" {
		tx = w.root // as the context has it in which the handler runs
	}
	return w.begin(ctx, tx, func(ctx context.Context, part pgx.Tx) error {
		w.handles = append(w.handles, part)
		err := w.run(ctx, one.body)
		if one.fails {
			err = errFails
		}
		return err
	})
}

// A transaction leaves what it would have left had it written everything at once, whatever its savepoints.
func TestDeferredMessagesFollowSavepoints(t *testing.T) {
	t.Parallel()
	db := testenv.Postgres(t)
	exec(t, db, `CREATE TABLE t (n integer); CREATE TABLE after (n integer, position bigint GENERATED ALWAYS AS IDENTITY)`)
	hub := changes.New(changes.Config{})
	topic := changes.NewTopic(hub, "savepoints", func(context.Context, []string) (map[string]*wrapperspb.StringValue,
		error) {
		return nil, nil
	})
	rapid.Check(t, func(rt *rapid.T) {
		program, fails := actions(rt, 3), rapid.Bool().Draw(rt, "fails")
		at := &world{begin: func(ctx context.Context, tx pgx.Tx, fn func(context.Context, pgx.Tx) error) error {
			return atOnce(ctx, tx, fn)
		}, after: func(ctx context.Context, tx pgx.Tx, _ bool, n int) error {
			_, err := tx.Exec(ctx, `INSERT INTO after (n) VALUES ($1)`, n)
			return err
		}}
		wantErr := pgx.BeginFunc(t.Context(), db, func(tx pgx.Tx) error {
			return at.whole(t.Context(), tx, program,
				fails)
		})
		want := leavings(t, db)
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
			return deferred.whole(t.Context(), tx,
				program, fails)
		})
		got := leavings(t, db)
		exec(t, db, `TRUNCATE outbox, outbox_scheduled, t, after`)

		got["after"] = nil
		for _, n := range called {
			got["after"] = append(got["after"], fmt.Sprint(n))
		}
		if (err == nil) != (wantErr == nil) || !slices.Equal(deferred.closed, at.closed) {
			rt.Fatalf("ended with %v, found closed %v; at once with %v, %v", err, deferred.closed, wantErr, at.closed)
		}
		for what := range want {
			if !slices.Equal(got[what], want[what]) {
				rt.Fatalf("left %v of %s, at once %v", got[what], what, want[what])
			}
		}
	})
}

// whole runs a program as a whole transaction.
func (w *world) whole(ctx context.Context, tx pgx.Tx, program []action, fails bool) error {
	w.root, w.handles, w.n, w.closed = tx, []pgx.Tx{tx}, 0, nil
	if err := w.run(ctx, program); err != nil || !fails {
		return err
	}
	return errFails
}

// atOnce is Transact within tx, without anything deferred.
func atOnce(ctx context.Context, tx pgx.Tx, fn func(context.Context, pgx.Tx) error) error {
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

// leavings is everything that a transaction left, in its order.
func leavings(t *testing.T, db *pgxpool.Pool) map[string][]string {
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

// A rollback that fails undoes nothing: the savepoint had gone with an outer one, and what was inserted since stays.
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

// A message that Insert accepts is in the log once its transaction has committed. So a transaction that has ended
// accepts none, like a statement.
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
