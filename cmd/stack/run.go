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

// exitNotStarted is what shells return for a command that does not exist.
const exitNotStarted = 127

// parentPoll is how often we look whether `go run` still lives.
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
	// In this order: a signal from here on is in the channel, an earlier one in ctx.
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
	// Linux ties the death signal to the thread that started the child, so this
	// thread must stay.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()

	// Our terminal sends Ctrl-C to the command as well as to us, and programs take a
	// second interrupt for "now". So it is forwarded only if the command does not get
	// it by itself. Then the command has a process group of its own, and the whole
	// group gets the signal, as it would from a terminal: a shell dies of SIGTERM
	// without telling what it waits for.
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
				_ = cmd.Process.Signal(received) // fails only if it has ended, which done will say
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

// watchParent sends us a SIGTERM when `go run` is gone. That one does not pass the
// signal on but dies of it, which would leave us and the servers behind. Any other
// parent may go without that meaning anything (nohup, disown).
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
