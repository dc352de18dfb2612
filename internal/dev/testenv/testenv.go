//go:build unix

// Package testenv gives each test real servers: its own Postgres database and RabbitMQ
// vhost, and a proxy that breaks the network.
//
// It guarantees that tests which need servers run against servers. It starts missing
// servers (see package localstack). If that fails, the tests fail with the reason; it
// never skips them. It also guarantees that no two tests share anything: NOTIFY
// channels and advisory locks belong to a database, and queues and exchanges to a
// vhost.
//
// It does not isolate the servers' CPU and disk, or server-wide views such as
// pg_stat_activity. A prepared transaction that a test leaves behind blocks the removal
// of its database and thereby fails that test.
package testenv

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
	"go.uber.org/goleak"

	"example.com/shop/internal/dev/localstack"
)

const (
	// linger bridges the gap between two test binaries of `go test ./...`, so that
	// RabbitMQ boots only once.
	linger = 15 * time.Second

	// startPatience covers a bare machine, where packages are installed first.
	startPatience = 5 * time.Minute

	// callPatience bounds each request of testenv itself to a server. It is long because
	// the tests of all packages may send requests at the same time.
	callPatience = 30 * time.Second
)

// environment is shared by all tests of a binary.
type environment struct {
	stack       *localstack.Stack
	maintenance *pgxpool.Pool // on a database that belongs to no test
	management  *management
	template    template
}

// env is set by Main while tests run. Tests cannot get it from TestMain in another way.
var env *environment

// Main runs the tests of a package that needs servers. TestMain must call only Main:
//
//	func TestMain(m *testing.M) { testenv.Main(m) }
//
// It also fails the run if all tests passed but goroutines are left. A package whose
// dependencies keep goroutines running lists them in options, with a reason.
func Main(m *testing.M, options ...goleak.Option) {
	localstack.RunWatchdog()
	code, err := run(m, options)
	if err != nil {
		fmt.Fprintf(os.Stderr, "testenv: %v\n", err)
		code = max(code, 1)
	}
	os.Exit(code)
}

func run(m *testing.M, options []goleak.Option) (code int, err error) {
	release, err := start()
	if err != nil {
		return 1, err
	}
	defer release()
	code = m.Run()
	env.close()
	// Ignore the leaks of failed tests, which may have failed before their cleanup.
	if code == 0 {
		err = goleak.Find(options...)
	}
	return code, err
}

func start() (release func(), err error) {
	// Ctrl-C while servers start must stop them. Later the tests handle it.
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	ctx, cancel := context.WithTimeout(ctx, startPatience)
	defer cancel()

	stack, release, err := localstack.Join(ctx, localstack.Config{Profile: "test", Linger: linger})
	if err != nil {
		return nil, err
	}
	maintenance, err := openMaintenance(ctx, stack.PostgresURL)
	if err != nil {
		release()
		return nil, err
	}
	client, err := newManagement(stack.ManagementURL)
	if err != nil {
		maintenance.Close()
		release()
		return nil, err
	}
	env = &environment{stack: stack, maintenance: maintenance, management: client}
	return release, nil
}

func (e *environment) close() {
	e.maintenance.Close()
	e.management.http.CloseIdleConnections()
}

// shared returns the environment, or fails the test if its package has no TestMain.
func shared(t testing.TB) *environment {
	t.Helper()
	if env == nil {
		t.Fatal("no servers: this package needs func TestMain(m *testing.M) { testenv.Main(m) }")
	}
	return env
}

// cleanupContext returns a context for cleanups, when the context of the test is done.
func cleanupContext() (context.Context, context.CancelFunc) {
	return context.WithTimeoutCause(context.Background(), callPatience, errors.New("server did not answer in time"))
}
