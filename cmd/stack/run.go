//go:build unix

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"example.com/shop/internal/dev/localstack"
)

// exitNotStarted is the status that shells return for a command that does not exist.
const exitNotStarted = 127

// parentPoll is the interval of the check that `go run` still runs.
const parentPoll = 200 * time.Millisecond

// runCommand runs the command with the stack's environment and returns its status.
func runCommand(ctx context.Context, config localstack.Config, argv []string) (int, error) {
	stopWatch := watchParent()
	defer stopWatch()
	stack, release, err := localstack.Join(ctx, config)
	if err != nil {
		return exitFailure, err
	}
	defer release()
	// First Notify, then check ctx: later signals are in the channel, earlier ones ended ctx.
	signals := make(chan os.Signal, 8)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM)
	defer signal.Stop(signals)
	if ctx.Err() != nil {
		return exitFailure, context.Cause(ctx)
	}
	return supervise(argv, append(os.Environ(), stack.Environ()...), signals)
}

// supervise runs the command, forwards signals to it and returns its status.
func supervise(argv, env []string, signals <-chan os.Signal) (int, error) {
	// Linux sends the death signal when the thread that started the child ends, so
	// this thread must stay.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()

	// In the foreground the terminal sends Ctrl-C to us and to the command. Programs
	// read a second interrupt as "stop now", so do not forward it. Otherwise the
	// command has its own process group, and the whole group gets the signal, as it
	// would from a terminal: a shell that dies of SIGTERM does not forward it to its
	// children.
	shared := inForeground()
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Env = env
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: !shared}
	endWithParent(cmd.SysProcAttr)
	if err := cmd.Start(); err != nil {
		return exitNotStarted, err
	}
	done := make(chan error, 1)
	go func() { done <- cmd.Wait() }()
	if shared {
		return relay(signals, done, func(received syscall.Signal) {
			if received != syscall.SIGINT {
				_ = cmd.Process.Signal(received) // fails only if the command has ended; see done
			}
		})
	}
	return relay(signals, done, func(received syscall.Signal) {
		_ = syscall.Kill(-cmd.Process.Pid, received)
	})
}

// relay forwards signals until the command ends, and returns its status.
func relay(signals <-chan os.Signal, done <-chan error, forward func(syscall.Signal)) (int, error) {
	for {
		select {
		case err := <-done:
			return exitStatus(err)
		case received := <-signals:
			forward(received.(syscall.Signal))
		}
	}
}

// exitStatus turns the result of a command into an exit status, as a shell does.
func exitStatus(err error) (int, error) {
	if err == nil {
		return 0, nil
	}
	var exit *exec.ExitError
	if !errors.As(err, &exit) {
		return exitFailure, fmt.Errorf("wait for the command: %w", err)
	}
	if status, ok := exit.Sys().(syscall.WaitStatus); ok && status.Signaled() {
		return 128 + int(status.Signal()), nil
	}
	return exit.ExitCode(), nil
}

// inForeground reports whether our process group is the one that gets the signals
// of the terminal.
func inForeground() bool {
	group, err := unix.IoctlGetInt(int(os.Stdin.Fd()), unix.TIOCGPGRP)
	return err == nil && group == unix.Getpgrp()
}

// watchParent sends us a SIGTERM when `go run` has ended. `go run` does not forward
// the signal but dies of it, which would leave us and the servers running. The end of
// any other parent means nothing (nohup, disown).
func watchParent() (stop func()) {
	parent := os.Getppid()
	if parentName(parent) != "go" {
		return func() {}
	}
	var watching sync.WaitGroup
	quit := make(chan struct{})
	watching.Go(func() {
		ticker := time.NewTicker(parentPoll)
		defer ticker.Stop()
		for os.Getppid() == parent {
			select {
			case <-quit:
				return
			case <-ticker.C:
			}
		}
		_ = syscall.Kill(os.Getpid(), syscall.SIGTERM)
	})
	return func() { close(quit); watching.Wait() }
}
