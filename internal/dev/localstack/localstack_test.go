//go:build unix

package localstack

import (
	"context"
	"errors"
	"io"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	RunWatchdog()
	goleak.VerifyTestMain(m)
}

// TestJoin covers everything that can happen to running servers in a single test,
// because each boot of RabbitMQ takes seven seconds.
func TestJoin(t *testing.T) {
	t.Setenv(postgresVar, "")
	t.Setenv(amqpVar, "")
	// As root this also covers the data in another place, because other users cannot
	// enter the parent of TempDir.
	config := Config{Dir: t.TempDir(), Profile: "test", Log: io.Discard}
	t.Cleanup(func() {
		if err := Down(context.Background(), config); err != nil {
			t.Errorf("down: %v", err)
		}
	})

	first, releaseFirst, err := Join(t.Context(), config)
	if err != nil {
		t.Fatalf("join: %v", err)
	}
	before := processes(t, config)
	ping(t, first)

	// A second user joins and replaces a killed watchdog.
	kill(t, before[watchdogName])
	second, releaseSecond, err := Join(t.Context(), config)
	if err != nil {
		t.Fatalf("join again: %v", err)
	}
	if *second != *first {
		t.Errorf("second user got %+v, want the same as the first: %+v", second, first)
	}
	if p := processes(t, config)[watchdogName]; !p.alive() || p == before[watchdogName] {
		t.Errorf("the killed watchdog was not replaced: %+v", p)
	}
	releaseSecond()
	ping(t, first) // the first user still uses them

	// A user replaces killed servers before the first user's release.
	for _, name := range []string{postgresName, rabbitmqName, epmdName} {
		kill(t, before[name])
	}
	third, releaseThird, err := Join(t.Context(), config)
	if err != nil {
		t.Fatalf("join after a crash: %v", err)
	}
	ping(t, third)

	data := dataDir(t, config)
	releaseFirst()
	ping(t, third)
	after := processes(t, config)
	releaseThird()
	for name, p := range after {
		if p.alive() {
			t.Errorf("%s still runs after the last release", name)
		}
	}
	if _, err := os.Stat(data); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("data is left in %s: %v", data, err)
	}
}

func TestJoinUsesServersOfTheEnvironment(t *testing.T) {
	config := Config{Dir: filepath.Join(t.TempDir(), "stack")}

	t.Run("Both", func(t *testing.T) {
		t.Setenv(postgresVar, "postgres://db/shop")
		t.Setenv(amqpVar, "amqp://me:secret@mq:5999/vhost")
		t.Setenv(managementVar, "")
		stack, release, err := Join(t.Context(), config)
		if err != nil {
			t.Fatalf("join: %v", err)
		}
		release()
		want := Stack{
			PostgresURL:   "postgres://db/shop",
			AMQPURL:       "amqp://me:secret@mq:5999/vhost",
			ManagementURL: "http://me:secret@mq:15672",
			External:      true,
		}
		if *stack != want {
			t.Errorf("got %+v, want %+v", *stack, want)
		}
	})

	t.Run("HalfIsAnError", func(t *testing.T) {
		for set, unset := range map[string]string{postgresVar: amqpVar, amqpVar: postgresVar} {
			t.Setenv(set, "amqp://somewhere")
			t.Setenv(unset, "")
			if _, _, err := Join(t.Context(), config); err == nil || !strings.Contains(err.Error(), unset) {
				t.Errorf("got %v, want an error that names %s", err, unset)
			}
		}
	})

	if _, err := os.Stat(config.Dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("something was started: %v", err)
	}
}

// A pid that now belongs to another process is never signalled.
func TestStopSparesRecycledPIDs(t *testing.T) {
	self, ok := startTime(os.Getpid())
	if !ok {
		t.Fatal("this process has no start time")
	}
	if p := (process{os.Getpid(), self}); !p.alive() {
		t.Errorf("%+v is this process, but not alive", p)
	}
	recycled := process{os.Getpid(), "another time"}
	if err := recycled.stop(stopAtOnce); err != nil { // would kill this test
		t.Errorf("stop: %v", err)
	}
}

func TestFailedBootShowsLog(t *testing.T) {
	inst := &instance{profile: profiles["test"], dir: t.TempDir()}
	start, err := inst.lockStart(t.Context())
	if err != nil {
		t.Fatalf("lock: %v", err)
	}
	defer start.unlock()
	attempts := 0
	err = inst.boot(t.Context(), "broken", func(ctx context.Context) error {
		attempts++
		argv := []string{"/bin/sh", "-c", "echo the reason; exit 1"}
		p, err := inst.spawn(command{name: "broken", argv: argv, dir: "/"})
		if err != nil {
			return err
		}
		return waitFor(ctx, p, time.Minute, func(context.Context) error { return errors.New("no answer") })
	})
	if err == nil || !strings.Contains(err.Error(), "the reason") || attempts != bootAttempts {
		t.Errorf("after %d attempts got %v, want the log after %d", attempts, err, bootAttempts)
	}
}

func TestStackDirIsNextToGoMod(t *testing.T) {
	t.Setenv(dirVar, "")
	root, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	deep := filepath.Join(root, "a", "b")
	if err := os.MkdirAll(deep, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(root, "go.mod"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	t.Chdir(deep)
	if dir, err := stackDir(""); err != nil || dir != filepath.Join(root, ".stack") {
		t.Errorf("got %s, %v", dir, err)
	}
}

func TestNewestVersionFirst(t *testing.T) {
	for path, want := range map[string]float64{
		"/usr/lib/postgresql/9.6/bin/postgres":              9.6,
		"/usr/lib/postgresql/15/bin/postgres":               15,
		"/opt/homebrew/opt/postgresql@17/bin/postgres":      17,
		"/usr/lib/erlang/erts-13.1.5/bin/epmd":              13.1,
		"/opt/homebrew/opt/erlang/lib/erlang/erts/bin/epmd": 0,
	} {
		if got := versionIn(path); got != want {
			t.Errorf("%s: got %v, want %v", path, got, want)
		}
	}
}

func ping(t *testing.T, stack *Stack) {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), stack.PostgresURL)
	if err != nil {
		t.Fatalf("reach postgres: %v", err)
	}
	if err := conn.Close(t.Context()); err != nil {
		t.Errorf("close connection: %v", err)
	}
	for _, listener := range []string{stack.AMQPURL, stack.ManagementURL} {
		parsed, err := url.Parse(listener)
		if err != nil {
			t.Fatalf("parse %s: %v", listener, err)
		}
		conn, err := net.Dial("tcp", parsed.Host)
		if err != nil {
			t.Fatalf("reach rabbitmq: %v", err)
		}
		conn.Close()
	}
}

func kill(t *testing.T, p process) {
	t.Helper()
	if err := syscall.Kill(p.PID, syscall.SIGKILL); err != nil {
		t.Fatalf("kill %+v: %v", p, err)
	}
	if !waitGone(p, 10*time.Second) {
		t.Fatalf("%+v survived", p)
	}
}

// processes returns the recorded processes, dead or alive.
func processes(t *testing.T, config Config) map[string]process {
	t.Helper()
	inst := newTestInstance(t, config)
	names, err := inst.records()
	if err != nil {
		t.Fatal(err)
	}
	found := make(map[string]process)
	for _, name := range names {
		found[name], _ = inst.recorded(name)
	}
	for _, name := range ownNames {
		if found[name].PID == 0 {
			t.Fatalf("%s is not recorded", name)
		}
	}
	return found
}

func dataDir(t *testing.T, config Config) string {
	t.Helper()
	inst := newTestInstance(t, config)
	inst.readState()
	if os.Geteuid() == 0 && strings.HasPrefix(inst.state.Data, config.Dir) {
		t.Errorf("data is in %s, which the servers cannot reach", inst.state.Data)
	}
	return inst.state.Data
}

func newTestInstance(t *testing.T, config Config) *instance {
	t.Helper()
	inst, err := newInstance(config)
	if err != nil {
		t.Fatal(err)
	}
	return inst
}
