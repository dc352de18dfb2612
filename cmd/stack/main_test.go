//go:build unix

package main

import (
	"bufio"
	"bytes"
	"errors"
	"io"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"example.com/shop/internal/dev/localstack"
)

// asStack turns the test binary into the stack command, watchdog included.
const asStack = "TEST_AS_STACK"

func TestMain(m *testing.M) {
	localstack.RunWatchdog()
	if os.Getenv(asStack) != "" {
		main()
	}
	os.Exit(m.Run())
}

func TestBadArgumentsExit2(t *testing.T) {
	for _, args := range [][]string{
		{},
		{"--"},
		{"--profile", "prod", "--", "true"},
		{"--unknown", "--", "true"},
		{"nonsense"},
		{"up", "--", "true"},
		{"daemon", "--", "true"},
		{"daemon", "relay"},
		{"daemon", "../relay", "--", "true"},
		{"daemon", "postgres", "--", "true"},
	} {
		var stdout, stderr bytes.Buffer
		if code := run(args, &stdout, &stderr); code != exitUsage {
			t.Errorf("%q: got status %d, want %d", args, code, exitUsage)
		}
		if lines := strings.Count(stderr.String(), "\n"); lines != 1 || stdout.Len() > 0 {
			t.Errorf("%q: got %q and %q, want one line on stderr", args, stdout.String(), stderr.String())
		}
	}
}

func TestNothingIsStartedIfTheEnvironmentNamesServers(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "stack")
	cmd := stack(t, dir, "--", "sh", "-c", `echo "$POSTGRES_URL $AMQP_URL $RABBITMQ_MANAGEMENT_URL"; exit 3`)
	cmd.Env = append(cmd.Env, "POSTGRES_URL=postgres://db", "AMQP_URL=amqp://mq")
	out, err := cmd.Output()
	if want := "postgres://db amqp://mq http://guest:guest@mq:15672\n"; string(out) != want {
		t.Errorf("got %q, want %q", out, want)
	}
	wantStatus(t, err, 3)
	if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("something was started: %v", err)
	}
}

func TestRun(t *testing.T) {
	dir := t.TempDir()

	t.Run("StopsServersWhenTheCommandFails", func(t *testing.T) {
		cmd := stack(t, dir, "--profile", "test", "--", "sh", "-c", `env; echo; cat; exit 7`)
		stdin, urls := started(t, cmd)
		for _, address := range urls {
			reach(t, address)
		}
		stdin.Close()
		wantStatus(t, cmd.Wait(), 7)
		for _, address := range urls {
			if reachable(address) {
				t.Errorf("%s still answers", address)
			}
		}
	})

	t.Run("StopsServersWhenKilled", func(t *testing.T) {
		// The kernel sends the signal that ends the shell.
		marker := filepath.Join(t.TempDir(), "terminated")
		cmd := stack(t, dir, "--profile", "test", "--", "sh", "-c",
			`trap 'touch "$0"; exit' TERM; env; echo; while :; do sleep 0.1; done`, marker)
		_, urls := started(t, cmd)
		if err := cmd.Process.Kill(); err != nil {
			t.Fatalf("kill: %v", err)
		}
		_ = cmd.Wait()
		for _, address := range urls {
			eventually(t, address+" stops", func() bool { return !reachable(address) })
		}
		if runtime.GOOS == "linux" {
			eventually(t, "the command ends", func() bool { _, err := os.Stat(marker); return err == nil })
		}
		eventually(t, "no process is recorded", func() bool {
			status, err := localstack.List(localstack.Config{Dir: dir})
			return err == nil && len(status) == 0
		})
	})
}

func TestUpDaemonDown(t *testing.T) {
	dir := t.TempDir()
	t.Cleanup(func() { mustRun(t, dir, "down") })
	exports := mustRun(t, dir, "--profile", "test", "up")
	if lines := strings.Count(exports, "export "); lines != 3 {
		t.Errorf("up printed %q, want three exports", exports)
	}

	// The second daemon replaces the first.
	done := filepath.Join(t.TempDir(), "terminated")
	daemon := []string{"--profile", "test", "daemon", "relay", "--", "sh", "-c",
		`trap 'echo x >>"$0"; exit' TERM; echo "at $POSTGRES_URL"; while :; do sleep 0.1; done`, done}
	mustRun(t, dir, daemon...)
	log := filepath.Join(dir, "test", "log", "relay.log")
	running := func() bool { text, _ := os.ReadFile(log); return bytes.HasPrefix(text, []byte("at postgres://")) }
	eventually(t, "the daemon runs", running)
	mustRun(t, dir, daemon...)
	eventually(t, "the second daemon runs", running)

	status := mustRun(t, dir, "status")
	for _, want := range []string{"relay", "postgres", "rabbitmq", "POSTGRES_URL="} {
		if !strings.Contains(status, want) {
			t.Errorf("status %q lacks %s", status, want)
		}
	}
	mustRun(t, dir, "down")
	if text, err := os.ReadFile(done); err != nil || string(text) != "x\nx\n" {
		t.Errorf("got %q, %v: want SIGTERM for both daemons", text, err)
	}
	if status := mustRun(t, dir, "status"); status != "nothing runs\n" {
		t.Errorf("after down: %s", status)
	}
}

func TestSignalsAreForwarded(t *testing.T) {
	cmd := stack(t, filepath.Join(t.TempDir(), "stack"), "--", "sh", "-c",
		`trap 'exit 9' TERM; env; echo; while :; do sleep 0.1; done`)
	cmd.Env = append(cmd.Env, "POSTGRES_URL=postgres://db", "AMQP_URL=amqp://mq")
	started(t, cmd)
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatalf("signal: %v", err)
	}
	wantStatus(t, cmd.Wait(), 9)
}

// stack returns a stack command with its folder in dir and without other settings in
// its environment.
func stack(t *testing.T, dir string, args ...string) *exec.Cmd {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatalf("find test binary: %v", err)
	}
	cmd := exec.Command(self, args...)
	cmd.Env = append(os.Environ(), asStack+"=yes", "STACK_DIR="+dir,
		"POSTGRES_URL=", "AMQP_URL=", "RABBITMQ_MANAGEMENT_URL=")
	cmd.Stderr = os.Stderr
	return cmd
}

// started starts a stack whose command prints its environment and then an empty
// line, and returns the addresses of the servers.
func started(t *testing.T, cmd *exec.Cmd) (stdin io.Closer, addresses []string) {
	t.Helper()
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatalf("start: %v", err)
	}
	for lines := bufio.NewScanner(out); lines.Scan() && lines.Text() != ""; {
		name, value, _ := strings.Cut(lines.Text(), "=")
		if !strings.HasSuffix(name, "_URL") || value == "" {
			continue
		}
		parsed, err := url.Parse(value)
		if err != nil {
			t.Fatalf("parse %s: %v", name, err)
		}
		addresses = append(addresses, parsed.Host)
	}
	if len(addresses) != 3 {
		t.Fatalf("the command got the servers %v, want three", addresses)
	}
	return in, addresses
}

func mustRun(t *testing.T, dir string, args ...string) string {
	t.Helper()
	out, err := stack(t, dir, args...).Output()
	if err != nil {
		t.Fatalf("stack %q: %v", args, err)
	}
	return string(out)
}

func wantStatus(t *testing.T, err error, want int) {
	t.Helper()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != want {
		t.Errorf("got %v, want status %d", err, want)
	}
}

func reachable(address string) bool {
	conn, err := net.Dial("tcp", address)
	if err != nil {
		return false
	}
	conn.Close()
	return true
}

func reach(t *testing.T, address string) {
	t.Helper()
	if !reachable(address) {
		t.Errorf("%s does not answer", address)
	}
}

func eventually(t *testing.T, condition string, check func() bool) {
	t.Helper()
	deadline := time.Now().Add(20 * time.Second)
	for !check() {
		if time.Now().After(deadline) {
			t.Fatalf("timeout: wait until %s", condition)
		}
		time.Sleep(20 * time.Millisecond)
	}
}
