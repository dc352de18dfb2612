//go:build unix

package localstack

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"
)

// ownNames lists the processes of this package. Every other record belongs to a daemon.
var ownNames = []string{postgresName, rabbitmqName, epmdName, watchdogName}

// daemonStop gives a daemon as much time to drain as in production.
var daemonStop = append([]stopStep{{syscall.SIGTERM, 15 * time.Second}}, stopAtOnce...)

var daemonName = regexp.MustCompile(`^[a-z0-9][a-z0-9_-]*$`)

// ErrBadName means that a daemon cannot have this name.
var ErrBadName = errors.New("a daemon's name has only lower case letters, digits, - and _, and is none of " +
	strings.Join(ownNames, ", "))

// Daemon starts a command in the background. It adds the stack's environment to the
// current one and writes the output to a log named after the daemon. It first stops a
// running daemon of that name, so a restart runs the new program. The daemon is a user
// of the servers. [Down] stops it.
func Daemon(ctx context.Context, config Config, name string, argv []string) (pid int, err error) {
	if !daemonName.MatchString(name) || slices.Contains(ownNames, name) {
		return 0, fmt.Errorf("%q: %w", name, ErrBadName)
	}
	program, err := exec.LookPath(argv[0])
	if err != nil {
		return 0, err
	}
	if program, err = filepath.Abs(program); err != nil {
		return 0, err
	}
	inst, err := newInstance(config)
	if err != nil {
		return 0, err
	}
	m, err := enter(ctx, config, false)
	if err != nil {
		return 0, err
	}
	defer m.release()
	start, err := inst.lockStart(ctx)
	if err != nil {
		return 0, err
	}
	defer start.unlock()
	if err := inst.halt(name, daemonStop); err != nil {
		return 0, err
	}
	working, err := os.Getwd()
	if err != nil {
		return 0, fmt.Errorf("find working directory: %w", err)
	}
	daemon, err := inst.spawn(command{
		name: name,
		argv: append([]string{program}, argv[1:]...),
		env:  append(os.Environ(), m.stack.Environ()...),
		dir:  working,
		// The daemon inherits the shared lock and holds it until it ends.
		inherit: m.inherit(),
	})
	return daemon.PID, err
}

// stopDaemons stops all daemons at the same time.
func (i *instance) stopDaemons() error {
	names, err := i.records()
	if err != nil {
		return err
	}
	var group errgroup.Group
	for _, name := range names {
		if !slices.Contains(ownNames, name) {
			group.Go(func() error { return i.halt(name, daemonStop) })
		}
	}
	return group.Wait()
}

// records returns the names of all recorded processes in alphabetical order.
func (i *instance) records() ([]string, error) {
	entries, err := os.ReadDir(i.path("run"))
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list records: %w", err)
	}
	var names []string
	for _, entry := range entries {
		if name, ok := strings.CutSuffix(entry.Name(), ".json"); ok {
			names = append(names, name)
		}
	}
	return names, nil
}
