package postgres

import (
	"context"
	"errors"
	"net"
	"strings"
	"sync/atomic"
	"testing"

	"example.com/shop/internal/dev/testenv"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

// firsts are all the calls with which a transaction can begin. Each inserts one row into t.
var firsts = map[string]func(ctx context.Context, tx pgx.Tx) error{
	"Exec": func(ctx context.Context, tx pgx.Tx) error {
		_, err := tx.Exec(ctx, `INSERT INTO t VALUES ($1)`, 1)
		return err
	},
	"ExecNamed": func(ctx context.Context, tx pgx.Tx) error {
		_, err := tx.Exec(ctx, `INSERT INTO t VALUES (@n)`, pgx.NamedArgs{"n": 1})
		return err
	},
	"ExecOfSeveral": func(ctx context.Context, tx pgx.Tx) error {
		_, err := tx.Exec(ctx, `INSERT INTO t VALUES (1); SELECT 1`)
		return err
	},
	"ExecWithOption": func(ctx context.Context, tx pgx.Tx) error {
		_, err := tx.Exec(ctx, `INSERT INTO t VALUES ($1)`, pgx.QueryExecModeExec, 1)
		return err
	},
	"Query": func(ctx context.Context, tx pgx.Tx) error {
		rows, err := tx.Query(ctx, `INSERT INTO t VALUES ($1) RETURNING n`, 1)
		if err != nil {
			return err
		}
		_, err = pgx.CollectExactlyOneRow(rows, pgx.RowTo[int])
		return err
	},
	"QueryLeftEarly": func(ctx context.Context, tx pgx.Tx) error {
		rows, err := tx.Query(ctx, `
			WITH inserted AS (INSERT INTO t VALUES (1) RETURNING n)
			SELECT n FROM inserted, generate_series(1, 10000)`)
		if err != nil {
			return err
		}
		if !rows.Next() {
			return errors.New("no rows")
		}
		rows.Close()
		return rows.Err()
	},
	"QueryWithOption": func(ctx context.Context, tx pgx.Tx) error {
		rows, err := tx.Query(ctx, `INSERT INTO t VALUES ($1) RETURNING n`, pgx.QueryResultFormats{pgx.TextFormatCode}, 1)
		if err != nil {
			return err
		}
		_, err = pgx.CollectExactlyOneRow(rows, pgx.RowTo[int])
		return err
	},
	"QueryRow": func(ctx context.Context, tx pgx.Tx) error {
		return tx.QueryRow(ctx, `INSERT INTO t VALUES ($1) RETURNING n`, 1).Scan(new(int))
	},
	"QueryRowOfNone": func(ctx context.Context, tx pgx.Tx) error {
		err := tx.QueryRow(ctx, `INSERT INTO t VALUES ($1)`, 1).Scan()
		if errors.Is(err, pgx.ErrNoRows) {
			return nil
		}
		return err
	},
	"SendBatch": func(ctx context.Context, tx pgx.Tx) error {
		var batch pgx.Batch
		batch.Queue(`INSERT INTO t VALUES ($1)`, 1)
		return tx.SendBatch(ctx, &batch).Close()
	},
	"SendBatchAndRead": func(ctx context.Context, tx pgx.Tx) error {
		var batch pgx.Batch
		batch.Queue(`INSERT INTO t VALUES ($1) RETURNING n`, 1).QueryRow(func(row pgx.Row) error {
			return row.Scan(new(int))
		})
		batch.Queue(`SELECT n FROM t WHERE n = $1`, 1)
		results := tx.SendBatch(ctx, &batch)
		var n int
		err := errors.Join(results.QueryRow().Scan(&n), results.QueryRow().Scan(&n))
		return errors.Join(err, results.Close())
	},
	"CopyFrom": func(ctx context.Context, tx pgx.Tx) error {
		_, err := tx.CopyFrom(ctx, pgx.Identifier{"t"}, []string{"n"}, pgx.CopyFromRows([][]any{{1}}))
		return err
	},
	"Prepare": func(ctx context.Context, tx pgx.Tx) error {
		if _, err := tx.Prepare(ctx, "one", `INSERT INTO t VALUES (1)`); err != nil {
			return err
		}
		_, err := tx.Exec(ctx, "one")
		return errors.Join(err, tx.Conn().Deallocate(ctx, "one"))
	},
	"Savepoint": func(ctx context.Context, tx pgx.Tx) error {
		savepoint, err := tx.Begin(ctx)
		if err != nil {
			return err
		}
		_, err = savepoint.Exec(ctx, `INSERT INTO t VALUES ($1)`, 1)
		return errors.Join(err, savepoint.Commit(ctx))
	},
	"LargeObjects": func(ctx context.Context, tx pgx.Tx) error {
		objects := tx.LargeObjects()
		if _, err := objects.Create(ctx, 0); err != nil {
			return err
		}
		_, err := tx.Exec(ctx, `INSERT INTO t SELECT count(*) FROM pg_largeobject_metadata`)
		return err
	},
	"Conn": func(ctx context.Context, tx pgx.Tx) error {
		_, err := tx.Conn().Exec(ctx, `INSERT INTO t VALUES (1)`)
		return err
	},
	"Deferred": func(_ context.Context, tx pgx.Tx) error {
		return deferring(1)(tx)
	},
}

// Whichever call begins a transaction is part of it, and the connection can be reused afterwards.
func TestHoweverATransactionBegins(t *testing.T) {
	t.Parallel()
	for _, mode := range []string{"cache_statement", "cache_describe", "describe_exec", "exec", "simple_protocol"} {
		t.Run(mode, func(t *testing.T) {
			t.Parallel()
			url := testenv.With(t, setup(t).Config().ConnString(), "default_query_exec_mode", mode)
			db := open(t, Config{URL: url, MaxConns: 1})
			for name, first := range firsts {
				if mode == "simple_protocol" && name == "CopyFrom" {
					continue // pgx itself needs a prepared statement for it
				}
				for range 2 { // the second time everything is prepared
					err := Transact(t.Context(), db, func(tx pgx.Tx) error {
						return errors.Join(first(t.Context(), tx), errProbe)
					})
					if err == nil || err.Error() != errProbe.Error() {
						t.Errorf("%s, rolled back: %v", name, err)
					}
					wantRows(t, db, 0)
					err = Transact(t.Context(), db, func(tx pgx.Tx) error {
						if err := first(t.Context(), tx); err != nil {
							return err
						}
						if got := Prepares(tx.Conn()); got != (mode == "cache_statement") {
							t.Errorf("Prepares returned %t", got)
						}
						var timeout string
						row := tx.QueryRow(t.Context(), `SELECT current_setting($1)`, "idle_in_transaction_session_timeout")
						if err := row.Scan(&timeout); err != nil || timeout != "1min" {
							t.Errorf("%s: the idle timeout is %q (%v)", name, timeout, err)
						}
						return nil
					})
					if err != nil {
						t.Errorf("%s, committed: %v", name, err)
					}
					wantRows(t, db, 1)
					exec(t, db, `TRUNCATE t`)
				}
			}
			if n := db.Stat().NewConnsCount(); n != 1 {
				t.Errorf("%d connections were made: one could not be reused", n)
			}
		})
	}
}

// countsWrites makes connections that count their writes.
type countsWrites struct{ n atomic.Int64 }

func (c *countsWrites) dial(ctx context.Context, network, address string) (net.Conn, error) {
	conn, err := new(net.Dialer).DialContext(ctx, network, address)
	return &countedConn{Conn: conn, writes: &c.n}, err
}

type countedConn struct {
	net.Conn
	writes *atomic.Int64
}

func (c *countedConn) Write(p []byte) (int, error) {
	c.writes.Add(1)
	return c.Conn.Write(p)
}

func TestBeginAndDeferredCostNoRoundTrip(t *testing.T) {
	t.Parallel()
	writes := new(countsWrites)
	db := alter(t, setup(t), func(c *pgxpool.Config) { c.ConnConfig.DialFunc, c.MaxConns = writes.dial, 1 })
	for name, test := range map[string]struct {
		fn   func(tx pgx.Tx) error
		want int64
	}{
		"nothing":   {func(pgx.Tx) error { return nil }, 0},
		"statement": {func(tx pgx.Tx) error { return insert(t, 1)(tx) }, 2},
		"deferred":  {func(tx pgx.Tx) error { return errors.Join(insert(t, 1)(tx), deferring(2)(tx)) }, 2},
		"batch":     {func(tx pgx.Tx) error { return firsts["SendBatch"](t.Context(), tx) }, 2},
		"two":       {func(tx pgx.Tx) error { return errors.Join(insert(t, 1)(tx), insert(t, 2)(tx)) }, 3},
	} {
		for _, prepared := range []bool{false, true} {
			exec(t, db, `TRUNCATE t`)
			before := writes.n.Load()
			if err := Transact(t.Context(), db, test.fn); err != nil {
				t.Fatal(err)
			}
			if n := writes.n.Load() - before; prepared && n != test.want {
				t.Errorf("%s: %d writes, want %d", name, n, test.want)
			}
		}
	}
}

// If the first statement fails, the transaction has failed, as with any other statement, even if BEGIN was never sent.
func TestTransactionsThatDoNotBegin(t *testing.T) {
	t.Parallel()
	for name, first := range map[string]func(ctx context.Context, tx pgx.Tx) error{
		"refused": func(ctx context.Context, tx pgx.Tx) error {
			_, err := tx.Exec(ctx, `INSERT INTO t VALUES ($1)`, 7)
			return err
		},
		"refused query": func(ctx context.Context, tx pgx.Tx) error {
			return tx.QueryRow(ctx, `INSERT INTO t VALUES ($1) RETURNING n`, 7).Scan(new(int))
		},
		"not prepared": func(ctx context.Context, tx pgx.Tx) error {
			_, err := tx.Exec(ctx, `INSERT INTO nowhere VALUES ($1)`, 1)
			return err
		},
		"query not prepared": func(ctx context.Context, tx pgx.Tx) error {
			_, err := tx.Query(ctx, `SELECT FROM nowhere`)
			return err
		},
		"batch not prepared": func(ctx context.Context, tx pgx.Tx) error {
			var batch pgx.Batch
			batch.Queue(`INSERT INTO t VALUES ($1)`, 1)
			batch.Queue(`SELECT FROM nowhere`)
			return tx.SendBatch(ctx, &batch).Close()
		},
		"batch refused": func(ctx context.Context, tx pgx.Tx) error {
			var batch pgx.Batch
			batch.Queue(`INSERT INTO t VALUES ($1)`, 1)
			batch.Queue(`INSERT INTO t VALUES ($1)`, 7)
			return tx.SendBatch(ctx, &batch).Close()
		},
		"not encoded": func(ctx context.Context, tx pgx.Tx) error {
			return tx.QueryRow(ctx, `INSERT INTO t VALUES ($1) RETURNING n`, struct{}{}).Scan(new(int))
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			db := alter(t, setup(t), func(c *pgxpool.Config) { c.MaxConns = 1 })
			exec(t, db, `INSERT INTO t VALUES (7)`)
			err := Transact(t.Context(), db, func(tx pgx.Tx) error {
				if err := first(t.Context(), tx); err == nil || strings.Contains(err.Error(), "not begun") {
					t.Errorf("first statement: %v", err)
				}
				if err := insert(t, 1)(tx); err == nil {
					t.Error("a later statement succeeded")
				}
				_ = deferring(2)(tx)
				_, _ = tx.Conn().Exec(t.Context(), `INSERT INTO t VALUES (3)`) // directly on the connection
				return nil
			})
			if !errors.Is(err, pgx.ErrTxCommitRollback) || errors.Is(err, ErrOutcomeUnknown) {
				t.Errorf("got error %v", err)
			}
			wantRows(t, db, 1)
			if err := Transact(t.Context(), db, insert(t, 1)); err != nil {
				t.Errorf("afterwards: %v", err)
			}
		})
	}
	t.Run("database down", func(t *testing.T) {
		t.Parallel()
		db := setup(t)
		for name, first := range firsts {
			lonely := alter(t, db, func(c *pgxpool.Config) { c.MaxConns = 1 })
			var pid int
			if err := lonely.QueryRow(t.Context(), `SELECT pg_backend_pid()`).Scan(&pid); err != nil {
				t.Fatal(err)
			}
			// The pool does not check a connection that was in use a moment ago.
			exec(t, db, `SELECT pg_terminate_backend($1, 5000)`, pid)
			err := Transact(t.Context(), lonely, func(tx pgx.Tx) error { return first(t.Context(), tx) })
			// LargeObjects can only return that they are closed.
			if errors.Is(err, ErrOutcomeUnknown) || !errors.Is(err, ErrUnavailable) && name != "LargeObjects" {
				t.Errorf("%s: got error %v", name, err)
			}
			wantRows(t, db, 0)
		}
	})
}

// A transaction that has ended does not use its connection, which another caller may have. A statement cannot end the
// transaction unnoticed.
func TestTransactionsEndOnce(t *testing.T) {
	t.Parallel()
	for name, fn := range map[string]func(tx pgx.Tx) error{
		"nothing":   func(pgx.Tx) error { return nil },
		"statement": insert(t, 1),
		"undone":    func(pgx.Tx) error { return errProbe },
		"deferred":  func(tx pgx.Tx) error { return errors.Join(insert(t, 1)(tx), deferring(2)(tx)) },
		"failed":    func(tx pgx.Tx) error { _, err := tx.Exec(t.Context(), `SELECT $1::int FROM nowhere`, 1); return err },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			db := setup(t)
			var left pgx.Tx
			_ = Transact(t.Context(), db, func(tx pgx.Tx) error { left = tx; return fn(tx) })
			exec(t, db, `TRUNCATE t`)
			for first, use := range firsts {
				if first != "Conn" { // it bypasses pgx' transaction
					if err := use(t.Context(), left); err == nil {
						t.Errorf("%s: succeeded after the end", first)
					}
				}
			}
			wantRows(t, db, 0)
		})
	}
	for name, end := range map[string]func(tx pgx.Tx) error{
		"by a statement": func(tx pgx.Tx) error {
			_, err := tx.Exec(t.Context(), `INSERT INTO t VALUES (1); COMMIT`)
			return err
		},
		"by a batch": func(tx pgx.Tx) error {
			var batch pgx.Batch
			batch.Queue(`INSERT INTO t VALUES ($1)`, 1)
			batch.Queue(`COMMIT`)
			return tx.SendBatch(t.Context(), &batch).Close()
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			db := setup(t)
			err := Transact(t.Context(), db, func(tx pgx.Tx) error {
				return errors.Join(end(tx), deferring(2)(tx))
			})
			if !errors.Is(err, ErrOutcomeUnknown) {
				t.Errorf("got error %v", err)
			}
			wantRows(t, db, 1)
		})
	}
}
