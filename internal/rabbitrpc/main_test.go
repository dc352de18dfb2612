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

// roleVariable makes the test binary a replica of the probe, for tests to kill.
const roleVariable = "PROBE_ROLE"

func TestMain(m *testing.M) {
	if role := os.Getenv(roleVariable); role != "" {
		if err := beReplica(role); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	testenv.Main(m)
}

// beReplica serves the probe over "http" or "amqp" until it is killed or its parent is gone.
func beReplica(role string) error {
	go func() {
		_, _ = os.Stdin.Read(make([]byte, 1)) // ends with the parent
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
	server := rabbitrpc.NewServer(rabbitrpc.ServerConfig{URL: os.Getenv("AMQP_URL"), Prefetch: 32, Log: silent}, newRPC(methods...))
	return server.Run(context.Background())
}

// effectsVariable names the directory in which effects are kept.
const effectsVariable = "PROBE_EFFECTS"

// put has an effect that no repetition changes: a file of this name is there.
func put(_ context.Context, in string) (string, error) {
	file, err := os.OpenFile(filepath.Join(os.Getenv(effectsVariable), in), os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if errors.Is(err, os.ErrExist) {
		return in, nil
	}
	if err != nil {
		return "", err
	}
	return in, errors.Join(file.Close(), record("put "+in))
}

// add has an effect each time: one more line.
func add(ctx context.Context, in string) (string, error) {
	if in == "hang" {
		fmt.Println("begun")
		<-ctx.Done()
	}
	time.Sleep(20 * time.Millisecond) // stands for work, so that calls are under way when the process dies
	return in, record("add " + in)
}

func record(line string) error {
	file, err := os.OpenFile(filepath.Join(os.Getenv(effectsVariable), "log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = file.WriteString(line + "\n")
	return errors.Join(err, file.Close())
}

// child is a replica in a process of its own.
type child struct {
	command *exec.Cmd
	lines   chan string
	ended   chan struct{}
}

// spawn starts a child. Its first line of output, and those after, come through lines.
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
	_ = c.command.Process.Signal(syscall.SIGKILL) // fails only if it has ended
	<-c.ended
}
