package postgres

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"sync/atomic"
	"testing"
	"time"

	"example.com/shop/internal/dev/testenv"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

func TestMain(m *testing.M) { testenv.Main(m) }

// setup returns a pool from Open on the test's own database, which has a table t of unique numbers.
func setup(t *testing.T) *pgxpool.Pool {
	t.Helper()
	url := testenv.PostgresURL(t)
	db := open(t, Config{URL: url})
	exec(t, db, `CREATE TABLE t (n integer PRIMARY KEY)`)
	return db
}

func open(t *testing.T, config Config) *pgxpool.Pool {
	t.Helper()
	db, err := Open(t.Context(), config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(db.Close)
	return db
}

// alter opens another pool with db's configuration and the given change.
func alter(t *testing.T, db *pgxpool.Pool, change func(config *pgxpool.Config)) *pgxpool.Pool {
	t.Helper()
	config := db.Config()
	change(config)
	other, err := pgxpool.NewWithConfig(t.Context(), config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(other.Close)
	return other
}

func exec(t *testing.T, db *pgxpool.Pool, sql string, args ...any) {
	t.Helper()
	if _, err := db.Exec(t.Context(), sql, args...); err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
}

// insert returns a transaction function that inserts a number.
func insert(t *testing.T, n int) func(tx pgx.Tx) error {
	return func(tx pgx.Tx) error {
		_, err := tx.Exec(t.Context(), `INSERT INTO t VALUES ($1)`, n)
		return err
	}
}

// wantRows checks how many numbers are in t, and that all connections are back in the pool and usable.
func wantRows(t *testing.T, db *pgxpool.Pool, want int) {
	t.Helper()
	var got int
	if err := db.QueryRow(t.Context(), `SELECT count(*) FROM t`).Scan(&got); err != nil || got != want {
		t.Errorf("got %d rows, %v, want %d", got, err, want)
	}
	testenv.Eventually(t, 10*time.Second, func() error { // the pool closes broken ones in the background
		if n := db.Stat().AcquiredConns(); n != 0 {
			return fmt.Errorf("%d connections were not released", n)
		}
		return nil
	})
}

// atCommit runs PL/pgSQL at COMMIT of each transaction that inserts into t; NEW.n is the number.
func atCommit(t *testing.T, db *pgxpool.Pool, body string) {
	t.Helper()
	exec(t, db, `CREATE FUNCTION at_commit() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN `+body+` RETURN NULL; END $$`)
	exec(t, db, `CREATE CONSTRAINT TRIGGER at_commit AFTER INSERT ON t DEFERRABLE INITIALLY DEFERRED
		FOR EACH ROW EXECUTE FUNCTION at_commit()`)
}

// losesCommit makes connections that lose the next COMMIT request, or the answer to it, if armed.
type losesCommit struct {
	request, answer atomic.Bool
}

func (l *losesCommit) dial(ctx context.Context, network, address string) (net.Conn, error) {
	conn, err := new(net.Dialer).DialContext(ctx, network, address)
	if err != nil {
		return nil, err
	}
	return &lossyConn{Conn: conn, faults: l}, nil
}

type lossyConn struct {
	net.Conn
	faults *losesCommit
	cut    atomic.Bool
}

func (c *lossyConn) Write(p []byte) (int, error) {
	if bytes.Contains(p, []byte("commit\x00")) && c.faults.request.CompareAndSwap(true, false) {
		c.Conn.Close()
		return len(p), nil // as if the kernel had accepted the data
	}
	return c.Conn.Write(p)
}

// Read waits for the answer, so that the commit is certainly done, and then closes the connection.
func (c *lossyConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if bytes.Contains(p[:n], []byte("COMMIT\x00")) && c.faults.answer.CompareAndSwap(true, false) {
		c.cut.Store(true)
	}
	if c.cut.Load() {
		c.Conn.Close()
		return 0, io.ErrUnexpectedEOF
	}
	return n, err
}
