//go:build unix

package testenv_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	"example.com/shop/internal/dev/testenv"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// A failover keeps the rows that the standby has. It loses rows whose COMMIT still waits for the standby.
func TestReplicated(t *testing.T) {
	t.Parallel()
	primary, standby := testenv.Replicated(t)
	connect(t, testenv.As(t, primary.URL(), "shop_api")) // succeeds only if the database is migrated
	first, notices := connect(t, primary.URL())
	mustExec(t, first, `CREATE TABLE kept (name text)`)
	mustExec(t, first, `INSERT INTO kept VALUES ('confirmed')`)

	// A frozen standby makes a COMMIT wait. A thaw ends the wait.
	standby.Freeze()
	thawed := execAside(t, first, `INSERT INTO kept VALUES ('thawed')`)
	primary.AwaitSyncWait(1)
	standby.Thaw()
	if err := <-thawed; err != nil {
		t.Errorf("insert during the freeze: %v", err)
	}

	// Without a standby a COMMIT waits until it is cancelled. Then it succeeds with a warning.
	standby.Stop()
	cancelled := execAside(t, first, `INSERT INTO kept VALUES ('cancelled')`)
	primary.AwaitSyncWait(1)
	other, _ := connect(t, primary.URL())
	mustExec(t, other, `SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE wait_event = 'SyncRep'`)
	if err := <-cancelled; err != nil {
		t.Errorf("insert without a standby: %v", err)
	}
	if warning := <-notices; warning.Severity != "WARNING" || warning.Code != "01000" {
		t.Errorf("got %+v, want a warning", warning)
	}
	if got, want := kept(t, primary.URL()), []string{"cancelled", "confirmed", "thawed"}; !slices.Equal(got, want) {
		t.Errorf("primary has %v, want %v", got, want)
	}
	short, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if _, err := first.Exec(short, `INSERT INTO kept VALUES ('too late')`); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v, want the deadline", err)
	}

	primary.Kill()
	if _, err := pgx.Connect(t.Context(), primary.URL()); err == nil {
		t.Error("the killed primary answers")
	}
	promoted := standby.Promote()
	if got, want := kept(t, promoted), []string{"confirmed", "thawed"}; !slices.Equal(got, want) {
		t.Errorf("promoted standby has %v, want %v", got, want)
	}
	after, _ := connect(t, promoted)
	mustExec(t, after, `INSERT INTO kept VALUES ('after')`)
}

// A killed server has its data after a restart.
func TestServerStartsAgain(t *testing.T) {
	t.Parallel()
	primary, standby := testenv.Replicated(t)
	conn, _ := connect(t, primary.URL())
	mustExec(t, conn, `CREATE TABLE kept AS SELECT 'before' AS name`)
	standby.Kill()
	primary.Kill()
	primary.Start()
	standby.Start()
	conn, _ = connect(t, primary.URL())
	mustExec(t, conn, `INSERT INTO kept VALUES ('after')`) // succeeds only if the standby streams again
	testenv.Eventually(t, 10*time.Second, func() error {   // COMMIT waits for the standby's disk, not for its replay
		if got, want := kept(t, standby.URL()), []string{"after", "before"}; !slices.Equal(got, want) {
			return fmt.Errorf("standby has %v, want %v", got, want)
		}
		return nil
	})
}

// execAside runs a statement in the background, and returns its outcome.
func execAside(t *testing.T, conn *pgx.Conn, sql string) <-chan error {
	t.Helper()
	done := make(chan error, 1)
	go func() {
		_, err := conn.Exec(t.Context(), sql)
		done <- err
	}()
	return done
}

func connect(t *testing.T, url string) (*pgx.Conn, <-chan *pgconn.Notice) {
	t.Helper()
	config, err := pgx.ParseConfig(url)
	if err != nil {
		t.Fatal(err)
	}
	notices := make(chan *pgconn.Notice, 10)
	config.OnNotice = func(_ *pgconn.PgConn, notice *pgconn.Notice) { notices <- notice }
	conn, err := pgx.ConnectConfig(t.Context(), config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close(context.WithoutCancel(t.Context())) })
	return conn, notices
}

func mustExec(t *testing.T, conn *pgx.Conn, sql string) {
	t.Helper()
	if _, err := conn.Exec(t.Context(), sql); err != nil {
		t.Errorf("%s: %v", sql, err)
	}
}

func kept(t *testing.T, url string) []string {
	t.Helper()
	conn, _ := connect(t, url)
	rows, err := conn.Query(t.Context(), `SELECT name FROM kept ORDER BY name`)
	if err != nil {
		t.Fatal(err)
	}
	names, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		t.Fatal(err)
	}
	return names
}
