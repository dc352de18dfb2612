//go:build unix

package testenv

import (
	"context"
	"fmt"
	"path/filepath"
	"testing"

	"example.com/shop/internal/dev/localstack"
	"example.com/shop/migrations"
	"github.com/jackc/pgx/v5"
)

// Cluster starts a private Postgres for the test with an empty database. It returns the database's URL for a superuser,
// and the folder of the server's programs, such as pg_dump.
func Cluster(t testing.TB) (url, programs string) {
	t.Helper()
	server := newServer(t, "cluster", localstack.Cluster)
	return server.URL(), server.cluster.Programs()
}

// Server is a private Postgres that the test may break. Its methods fail the test on any error. Call them from the
// test's goroutine. The server ends with the test, even if it is frozen or the test is killed.
type Server struct {
	t       testing.TB
	cluster *localstack.Server
}

// Replicated starts a primary with a migrated database and a synchronous standby: a COMMIT that wrote something waits
// until the standby has it on disk. [As] returns URLs for the service's roles on either server. Starting takes some
// seconds.
//
// For a failover kill the primary, then promote the standby. While the standby is stopped, killed or frozen, a COMMIT
// waits without a limit. If that wait is cancelled, for instance by pgx at a deadline, the transaction is committed on
// the primary with a warning, and can be read there. A failover is certain to lose it if the standby was stopped or
// killed before the COMMIT. If the standby is frozen, the transaction waits in a socket and arrives after the thaw.
func Replicated(t testing.TB) (primary, standby *Server) {
	t.Helper()
	primary = newServer(t, "primary", localstack.Cluster)
	standby = newServer(t, "standby", func(ctx context.Context, config localstack.Config) (*localstack.Server, error) {
		return localstack.Standby(ctx, config, primary.cluster, "standby")
	})
	primary.exec(`ALTER SYSTEM SET synchronous_standby_names = 'standby'`, `SELECT pg_reload_conf()`)
	primary.awaitStandby()
	if _, err := migrations.Up(t.Context(), primary.URL()); err != nil {
		t.Fatalf("migrate primary: %v", err)
	}
	return primary, standby
}

func newServer(
	t testing.TB, name string, start func(context.Context, localstack.Config) (*localstack.Server, error),
) *Server {
	t.Helper()
	shared(t) // starts the watchdog
	ctx, cancel := context.WithTimeout(t.Context(), startPatience)
	defer cancel()
	cluster, err := start(ctx, localstack.Config{Dir: filepath.Join(t.TempDir(), name), Profile: "test"})
	if err != nil {
		t.Fatalf("start %s: %v", name, err)
	}
	t.Cleanup(cluster.Release)
	return &Server{t: t, cluster: cluster}
}

// URL returns a superuser's URL of the server's database. A restart can change it.
func (s *Server) URL() string { return s.cluster.URL() }

// Start restarts the server after Stop or Kill, and waits until it answers.
func (s *Server) Start() {
	s.t.Helper()
	s.must("start server", s.cluster.Start(s.t.Context()))
}

// Stop shuts the server down cleanly.
func (s *Server) Stop() {
	s.t.Helper()
	s.must("stop server", s.cluster.Stop(s.t.Context()))
}

// Kill ends all processes of the server at once, with SIGKILL.
func (s *Server) Kill() {
	s.t.Helper()
	s.must("kill server", s.cluster.Kill(s.t.Context()))
}

// Freeze suspends all processes of the server. Its connections stay open, but do not answer until Thaw.
func (s *Server) Freeze() {
	s.t.Helper()
	s.must("freeze server", s.cluster.Freeze())
}

// Thaw resumes a frozen server.
func (s *Server) Thaw() {
	s.t.Helper()
	s.must("thaw server", s.cluster.Thaw())
}

// Promote promotes a standby to primary and returns its URL when it accepts writes. It starts a stopped standby. If the
// old primary still runs, the standby catches up first. Commits on the new primary wait for no standby.
func (s *Server) Promote() (url string) {
	s.t.Helper()
	s.Start()
	s.must("promote standby", s.cluster.Promote(s.t.Context()))
	return s.URL()
}

// AwaitSyncWait returns when exactly this number of sessions of the primary wait for the standby in COMMIT.
func (s *Server) AwaitSyncWait(sessions int) {
	s.t.Helper()
	s.await(`SELECT count(*) = $1 FROM pg_stat_activity WHERE wait_event = 'SyncRep'`, sessions)
}

// awaitStandby returns when the standby is connected and every COMMIT waits for it.
func (s *Server) awaitStandby() {
	s.t.Helper()
	s.await(`SELECT EXISTS (SELECT FROM pg_stat_replication WHERE sync_state = 'sync')`)
}

// await returns when a query returns true.
func (s *Server) await(sql string, args ...any) {
	s.t.Helper()
	conn := s.connect()
	defer conn.Close(context.WithoutCancel(s.t.Context()))
	Eventually(s.t, callPatience, func() error {
		var reached bool
		if err := conn.QueryRow(s.t.Context(), sql, args...).Scan(&reached); err != nil {
			return err
		}
		if !reached {
			return fmt.Errorf("false: %s %v", sql, args)
		}
		return nil
	})
}

func (s *Server) exec(statements ...string) {
	s.t.Helper()
	conn := s.connect()
	defer conn.Close(context.WithoutCancel(s.t.Context()))
	for _, sql := range statements {
		_, err := conn.Exec(s.t.Context(), sql)
		s.must(sql, err)
	}
}

func (s *Server) connect() *pgx.Conn {
	s.t.Helper()
	conn, err := pgx.Connect(s.t.Context(), s.URL())
	s.must("connect", err)
	return conn
}

func (s *Server) must(action string, err error) {
	s.t.Helper()
	if err != nil {
		s.t.Fatalf("%s: %v", action, err)
	}
}
