package rabbitrpc_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"connectrpc.com/connect/v2"
	"example.com/shop/internal/dev/testenv"
	"example.com/shop/internal/rabbitrpc"
	"example.com/shop/internal/rpcserver"
)

// roleVariable makes the test binary run as a replica of the probe, which tests can kill.
const roleVariable = "PROBE_ROLE"

func TestMain(m *testing.M) {
	if role := os.Getenv(roleVariable); role != "" {
		if err := runReplica(role); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	testenv.Main(m)
}

// runReplica serves the probe over "http" or "amqp" until it is killed or its parent exits.
func runReplica(role string) error {
	go func() {
		_, _ = os.Stdin.Read(make([]byte, 1)) // returns when the parent exits
		os.Exit(0)
	}()
	methods := []func(*connect.Server){register(again, put), register(once, add)}
	if role == "http" {
		listener, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return err
		}
		fmt.Println(listener.Addr())
		return rpcserver.New(rpcserver.Config{Log: silent}, methods...).Serve(context.Background(), listener)
	}
	config := rabbitrpc.ServerConfig{URL: os.Getenv("AMQP_URL"), Prefetch: 32, Log: silent}
	return rabbitrpc.NewServer(config, newRPC(methods...)).Run(context.Background())
}

// effectsVariable names the directory in which effects are recorded.
const effectsVariable = "PROBE_EFFECTS"

// put has an idempotent effect: it creates a file of this name.
func put(_ context.Context, in string) (string, error) {
	path := filepath.Join(os.Getenv(effectsVariable), in)
	file, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if errors.Is(err, os.ErrExist) {
		return in, nil
	}
	if err != nil {
		return "", err
	}
	return in, errors.Join(file.Close(), record("put "+in))
}

// add has an effect each time: it adds a line to the log.
func add(ctx context.Context, in string) (string, error) {
	if in == "hang" {
		fmt.Println("begun")
		<-ctx.Done()
	}
	time.Sleep(20 * time.Millisecond) // simulates work, so that calls are in flight when the process dies
	return in, record("add " + in)
}

func record(line string) error {
	path := filepath.Join(os.Getenv(effectsVariable), "log")
	file, err := os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = file.WriteString(line + "\n")
	return errors.Join(err, file.Close())
}

// child is a replica in a separate process.
type child struct {
	command *exec.Cmd
	lines   chan string
	ended   chan struct{}
}

// spawn starts a child. Its output arrives on lines.
func spawn(t *testing.T, role string, environment ...string) *child {
	t.Helper()
	c := &child{command: exec.Command(os.Args[0]), lines: make(chan string, 10), ended: make(chan struct{})}
	c.command.Env = append(os.Environ(), append(environment, roleVariable+"="+role)...)
	c.command.Stdout, c.command.Stderr = c, os.Stderr
	stdin, err := c.command.StdinPipe()
	if err == nil {
		err = c.command.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(c.ended)
		_ = c.command.Wait() // it is killed
	}()
	t.Cleanup(func() {
		_ = stdin.Close()
		c.kill()
	})
	return c
}

// Write takes the child's output.
func (c *child) Write(p []byte) (int, error) {
	for _, line := range strings.Fields(string(p)) {
		c.lines <- line
	}
	return len(p), nil
}

func (c *child) kill() {
	_ = c.command.Process.Signal(syscall.SIGKILL) // fails only if the process has already exited
	<-c.ended
}
