//go:build unix

// Package testenv gives tests real servers: a Postgres database and a RabbitMQ
// vhost of their own, and a proxy to break the network with.
//
// It guarantees that tests which ask for servers run against servers. They are
// started when missing (see package localstack), and if that fails the tests fail
// with the reason; nothing is ever skipped. It also guarantees that no two tests
// share anything: NOTIFY channels and advisory locks belong to a database, and
// queues and exchanges to a vhost.
//
// What it does not isolate: the servers' CPU and disk, server-wide views such as
// pg_stat_activity, and prepared transactions that a test leaves behind, which
// block the removal of its database and thereby fail that test.
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
	// they share one boot of RabbitMQ.
	linger = 15 * time.Second

	// startPatience covers a bare machine, where packages are installed first.
	startPatience = 5 * time.Minute

	// callPatience bounds each thing that testenv itself asks of a server. It is
	// long because the tests of all packages may be asking at the same time.
	callPatience = 30 * time.Second
)

// environment is what all tests of a binary share.
type environment struct {
	stack       *localstack.Stack
	maintenance *pgxpool.Pool // of a database that is no test's
	management  *management
	template    template
}

// env is set by Main while tests run. Tests have no other way to get at what
// TestMain made.
var env *environment

// Main runs the tests of a package that needs servers. TestMain calls it and
// nothing else:
//
//	func TestMain(m *testing.M) { testenv.Main(m) }
//
// It also fails the run if goroutines are left when all tests have passed. Nothing
// is excepted from that; a package whose dependencies keep goroutines for good
// names them in options, with a reason.
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
	// Leaks of failed tests say nothing: they failed before they could clean up.
	if code == 0 {
		err = goleak.Find(options...)
	}
	return code, err
}

func start() (release func(), err error) {
	// Ctrl-C while servers start must stop them; later it is the tests' business.
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

// shared returns the environment, or fails the test with what its author forgot.
func shared(t testing.TB) *environment {
	t.Helper()
	if env == nil {
		t.Fatal("no servers: this package needs  func TestMain(m *testing.M) { testenv.Main(m) }")
	}
	return env
}

// cleanupContext is for cleanups: the context of a test is done by then.
func cleanupContext() (context.Context, context.CancelFunc) {
	return context.WithTimeoutCause(context.Background(), callPatience, errors.New("server did not answer in time"))
}
