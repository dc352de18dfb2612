//go:build unix

package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"example.com/shop/internal/auth"
	"example.com/shop/internal/rabbit"
)

var processNames = []string{"api", "relay", "consumer"}

const (
	// relayLease is the relay's minimum, so that the successor of a killed relay does not wait long.
	relayLease = "1s"
	// startPatience bounds the time until a process is ready.
	startPatience = 30 * time.Second
	// stopPatience is longer than the processes' drain timeout.
	stopPatience = 15 * time.Second
)

// build compiles the service. It belongs to the same module, whose path may differ in services made from the template.
func build(ctx context.Context, binary string) error {
	self, ok := debug.ReadBuildInfo()
	if !ok {
		return errors.New("build cmd/shop: this binary has no build information")
	}
	output, err := exec.CommandContext(ctx, "go", "build", "-o", binary, self.Main.Path+"/cmd/shop").CombinedOutput()
	if err != nil {
		return fmt.Errorf("build cmd/shop: %w\n%s", err, output)
	}
	return nil
}

// fleet runs the service's processes as children.
type fleet struct {
	binary string
	dir    string // of the logs
	env    []string
	own    map[string][]string     // additional environment by process: its logins
	apiKey string                  // for the load
	addrs  map[string]string       // listen address by process
	ops    map[string]string       // address of the operators' port by process
	fail   context.CancelCauseFunc // called when a process ends unexpectedly
	starts chan func()

	mu      sync.Mutex
	running map[string]*process
}

// process is a child.
type process struct {
	name    string
	command *exec.Cmd
	done    chan struct{} // closed when the process has ended
	err     error         // of Wait, valid once done is closed
	ending  bool          // set when we signal it; guarded by fleet.mu
}

func newFleet(binary, dir string, box *sandbox, fail context.CancelCauseFunc) (*fleet, error) {
	apiKey, line, err := auth.NewKey("demo", []string{"customer", "warehouse"})
	if err != nil {
		return nil, err
	}
	f := &fleet{
		binary: binary, dir: dir, fail: fail, apiKey: apiKey,
		env: append(withoutService(os.Environ()), "RELAY_LEASE="+relayLease, "TOPOLOGY=given",
			// The load is a single caller with the calls of all customers: lift the limits per caller.
			"API_KEYS="+line, "CALLER_RATE=0", "CALLER_CONCURRENCY=0", "CALL_KEYS="+newCallKey()),
		own: map[string][]string{
			"migrate": {"POSTGRES_URL=" + box.postgresURL}, "topology": {"AMQP_URL=" + box.direct},
		},
		addrs: map[string]string{}, ops: map[string]string{}, running: map[string]*process{},
		starts: make(chan func()),
	}
	for _, name := range processNames {
		for _, addrs := range []map[string]string{f.addrs, f.ops} {
			listener, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				return nil, fmt.Errorf("find a free port: %w", err)
			}
			defer listener.Close() // only after all ports are chosen, because they must differ
			addrs[name] = listener.Addr().String()
		}
	}
	go func() {
		// Linux sends the death signal when the thread that started the child ends. This thread lives as long as the demo.
		runtime.LockOSThread()
		for start := range f.starts {
			start()
		}
	}()
	return f, nil
}

// newCallKey makes a key that signs the callers of durable calls in this run.
func newCallKey() string {
	var key [32]byte
	_, _ = rand.Read(key[:]) // never fails
	return base64.StdEncoding.EncodeToString(key[:])
}

// withoutService removes the service's settings, so that the processes run with their defaults.
func withoutService(environ []string) []string {
	prefixes := []string{
		"LISTEN=", "OPS_LISTEN=", "EXCHANGE=", "LOG_", "RELAY_", "CONSUMER_", "POSTGRES_", "AMQP_URL=", "TOPOLOGY=",
		"API_KEYS", "JWT_", "TLS_", "CALLER_", "CORS_", "INSECURE_", "HTTP_MAX_CONNS", "READ_MAX_BYTES=",
		"IN_FLIGHT_MAX_BYTES=", "CALL_", "RPC_", "OUTBOX_", "MAX_BACKLOG",
	}
	return slices.DeleteFunc(environ, func(entry string) bool {
		return slices.ContainsFunc(prefixes, func(prefix string) bool { return strings.HasPrefix(entry, prefix) })
	})
}

func (f *fleet) addr(name string) string { return f.addrs[name] }

func (f *fleet) pid(name string) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.running[name].command.Process.Pid
}

// prepare creates the schema and the topology, and for each process logins with only the permissions that it needs.
func (f *fleet) prepare(ctx context.Context, box *sandbox) error {
	if _, err := f.call(ctx, "migrate"); err != nil {
		return err
	}
	output, err := f.call(ctx, "topology", "--declare", "--json")
	if err != nil {
		return err
	}
	var topology struct{ Permissions map[string]rabbit.Permissions }
	if err := json.Unmarshal(output, &topology); err != nil {
		return fmt.Errorf("topology: %w", err)
	}
	for _, name := range processNames {
		f.own[name] = []string{"POSTGRES_URL=" + box.withRole("shop_"+name)}
		if permissions, ok := topology.Permissions[name]; ok {
			amqpURL, err := box.addUser(ctx, name, permissions)
			if err != nil {
				return err
			}
			f.own[name] = append(f.own[name], "AMQP_URL="+amqpURL)
		}
	}
	return nil
}

// call runs a command of the service and returns its output.
func (f *fleet) call(ctx context.Context, args ...string) ([]byte, error) {
	command := exec.CommandContext(ctx, f.binary, args...)
	command.Env = slices.Concat(f.env, f.own[args[0]])
	var failure bytes.Buffer
	command.Stderr = &failure
	output, err := command.Output()
	if err != nil {
		return nil, fmt.Errorf("%s: %w\n%s", args[0], err, failure.Bytes())
	}
	return output, nil
}

// start starts a process and returns when it is ready. It appends to the log of its predecessor.
func (f *fleet) start(ctx context.Context, name string) error {
	log, err := os.OpenFile(f.logPath(name), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer log.Close() // the child has its own descriptor
	command := exec.Command(f.binary, name)
	command.Env = slices.Concat(f.env, f.own[name], []string{"LISTEN=" + f.addrs[name], "OPS_LISTEN=" + f.ops[name]})
	command.Stdout, command.Stderr = log, log
	// Use a separate process group, so that Ctrl-C reaches only the demo, which then stops its children in order.
	command.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	endWithUs(command.SysProcAttr)
	started := make(chan error)
	f.starts <- func() { started <- command.Start() }
	if err := <-started; err != nil {
		return fmt.Errorf("start %s: %w", name, err)
	}
	p := &process{name: name, command: command, done: make(chan struct{})}
	f.mu.Lock()
	f.running[name] = p
	f.mu.Unlock()
	go f.reap(p)
	return f.awaitReady(ctx, p)
}

func (f *fleet) reap(p *process) {
	p.err = p.command.Wait()
	f.mu.Lock()
	expected := p.ending
	f.mu.Unlock()
	close(p.done)
	if !expected {
		f.fail(fmt.Errorf("%s ended unexpectedly: %w%s", p.name, orZero(p.err), f.tail(p.name)))
	}
}

// orZero returns an error for a process that ended without one.
func orZero(err error) error {
	if err == nil {
		return errors.New("exit status 0")
	}
	return err
}

func (f *fleet) awaitReady(ctx context.Context, p *process) error {
	ctx, cancel := context.WithTimeout(ctx, startPatience)
	defer cancel()
	ticker := time.NewTicker(50 * time.Millisecond)
	defer ticker.Stop()
	for {
		if ready(ctx, "http://"+f.ops[p.name]+"/readyz") {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%s is not ready: %w%s", p.name, ctx.Err(), f.tail(p.name))
		case <-p.done:
			return fmt.Errorf("%s ended during its start: %w%s", p.name, orZero(p.err), f.tail(p.name))
		case <-ticker.C:
		}
	}
}

func ready(ctx context.Context, url string) bool {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return false
	}
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		return false
	}
	response.Body.Close()
	return response.StatusCode == http.StatusOK
}

// kill sends SIGKILL to a process and waits until it has ended.
func (f *fleet) kill(name string) (pid int) {
	p := f.end(name, syscall.SIGKILL)
	<-p.done
	return p.command.Process.Pid
}

func (f *fleet) end(name string, signal syscall.Signal) *process {
	f.mu.Lock()
	defer f.mu.Unlock()
	p := f.running[name]
	p.ending = true
	_ = p.command.Process.Signal(signal) // fails only if the process has ended
	return p
}

// stop ends all processes with SIGTERM, and returns the errors of those that did not stop cleanly. It may be called
// twice.
func (f *fleet) stop() error {
	f.mu.Lock()
	names := slices.Sorted(maps.Keys(f.running))
	f.mu.Unlock()
	var ended []*process
	for _, name := range names {
		ended = append(ended, f.end(name, syscall.SIGTERM))
	}
	patience := time.After(stopPatience)
	var errs []error
	for _, p := range ended {
		select {
		case <-p.done:
		case <-patience:
			f.kill(p.name)
		}
		if p.err != nil {
			errs = append(errs, fmt.Errorf("%s did not stop cleanly: %w%s", p.name, p.err, f.tail(p.name)))
		}
	}
	f.mu.Lock()
	clear(f.running)
	f.mu.Unlock()
	return errors.Join(errs...)
}

func (f *fleet) logPath(name string) string { return filepath.Join(f.dir, name+".log") }

// tail returns the end of a process's log, as part of an error text.
func (f *fleet) tail(name string) string {
	content, err := os.ReadFile(f.logPath(name))
	if err != nil {
		return ""
	}
	lines := bytes.Split(bytes.TrimSpace(content), []byte("\n"))
	last := lines[max(0, len(lines)-12):]
	return fmt.Sprintf("\nthe end of %s:\n    %s", f.logPath(name), bytes.Join(last, []byte("\n    ")))
}
