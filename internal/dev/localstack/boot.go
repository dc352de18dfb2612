//go:build unix

package localstack

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"syscall"
	"time"
)

// bootAttempts is the number of attempts to start a server that ends while it boots.
// That has two legitimate causes: another process took a port between the check and
// the bind, or backends of a killed postmaster have not noticed its death yet.
const bootAttempts = 3

// bootPatience covers a boot of RabbitMQ on a machine that is busy compiling. It takes
// seven seconds on two idle cores.
const bootPatience = 90 * time.Second

var errEnded = errors.New("the process ended")

// boot tries to start the server until it answers. A failed attempt must leave nothing
// running.
func (i *instance) boot(ctx context.Context, name string, attempt func(context.Context) error) error {
	var err error
	for range bootAttempts {
		if err = attempt(ctx); err == nil {
			return nil
		}
		if !errors.Is(err, errEnded) {
			break
		}
	}
	if ctx.Err() != nil {
		return fmt.Errorf("start %s: %w", name, context.Cause(ctx))
	}
	return fmt.Errorf("start %s: %w\nlast lines of %s:\n%s", name, err, i.logPath(name), i.logTail(name))
}

// waitFor polls until check succeeds. It stops at the deadline, and when the process
// has ended.
func waitFor(ctx context.Context, p process, timeout time.Duration, check func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	ticker := time.NewTicker(50 * time.Millisecond)
	defer ticker.Stop()
	for {
		err := check(ctx)
		if err == nil {
			return nil
		}
		if !p.alive() {
			return errEnded
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%w; last attempt: %w", ctx.Err(), err)
		case <-ticker.C:
		}
	}
}

// setPorts replaces ports that are not free and saves the state. Two servers that start
// at the same time may call it.
func (i *instance) setPorts(ports ...*int) error {
	i.mu.Lock()
	defer i.mu.Unlock()
	for _, port := range ports {
		var err error
		if *port, err = freePort(*port, i.state.ports()...); err != nil {
			return err
		}
	}
	return writeJSON(i.path("state.json"), i.state)
}

// runAs runs a program as the account until it ends. The error contains its output.
func runAs(ctx context.Context, account *account, argv ...string) error {
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Dir, cmd.Env = "/", serverEnv("/")
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: account.credential()}
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("run %s: %w\n%s", argv[0], err, out)
	}
	return nil
}

// serverEnv returns the whole environment of a server. It inherits nothing else,
// because the developer's RABBITMQ_* and PG* variables must not reach a private server.
func serverEnv(home string, more ...string) []string {
	return append([]string{
		"PATH=" + os.Getenv("PATH"),
		"HOME=" + home,
		"TMPDIR=" + os.TempDir(),
		"LC_ALL=C",
	}, more...)
}
