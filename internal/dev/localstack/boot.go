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

// bootAttempts is how often a server that ends while it boots is started again.
// There are two honest reasons for that: a port was taken between the look and the
// bind, and backends of a killed postmaster that have not noticed its death yet.
const bootAttempts = 3

// bootPatience covers RabbitMQ, which boots for seven seconds on two idle cores, on
// a machine that is busy compiling.
const bootPatience = 90 * time.Second

var errEnded = errors.New("it ended")

// boot runs one attempt until the server answers. Each attempt leaves nothing
// running behind if it fails.
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

// waitFor polls until check succeeds. It gives up when the process is gone, since
// nothing will answer then, and at the deadline.
func waitFor(ctx context.Context, p process, patient time.Duration, check func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, patient)
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

// setPorts changes the ports in the state and saves it, for two servers that start
// at the same time.
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

// runAs runs a program to its end as the account, with its output in the error.
func runAs(ctx context.Context, account *account, argv ...string) error {
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Dir, cmd.Env = "/", serverEnv("/")
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: account.credential()}
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("run %s: %w\n%s", argv[0], err, out)
	}
	return nil
}

// serverEnv is the whole environment of a server, and nothing is inherited:
// RABBITMQ_* and PG* variables of the developer must not reach a private server.
func serverEnv(home string, more ...string) []string {
	return append([]string{
		"PATH=" + os.Getenv("PATH"),
		"HOME=" + home,
		"TMPDIR=" + os.TempDir(),
		"LC_ALL=C",
	}, more...)
}
