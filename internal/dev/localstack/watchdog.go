//go:build unix

package localstack

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"
)

const (
	// watchdogVar names the folder of the instance to watch.
	watchdogVar  = "LOCALSTACK_WATCHDOG"
	watchdogName = "watchdog"

	// watchdogTick is the interval of the watchdog's checks for users.
	watchdogTick = 500 * time.Millisecond

	// minLinger is the watchdog's minimum wait. It stops the servers of a user without
	// a linger time only if that user was killed.
	minLinger = time.Second
)

// watchdogArmed records that RunWatchdog was called. Without that call, starting a
// watchdog would run the whole program again.
var watchdogArmed bool

// RunWatchdog must be the first call of main and of TestMain in programs that call
// [Join] or [Up]. It returns immediately, except in the copy of the program that Join
// starts as the watchdog: there it watches, and then exits the process.
func RunWatchdog() {
	watchdogArmed = true
	dir := os.Getenv(watchdogVar)
	if dir == "" {
		return
	}
	inst := &instance{profile: profiles[filepath.Base(dir)], dir: dir, log: os.Stderr}
	if err := inst.watch(os.NewFile(watchdogLockFD, "watchdog.lock")); err != nil {
		fmt.Fprintf(os.Stderr, "localstack: watch %s: %v\n", dir, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// watchdogLockFD is the number of the first inherited file in a child.
const watchdogLockFD = 3

// ensureWatchdog starts a watchdog unless one runs. The caller must hold start.lock.
func (i *instance) ensureWatchdog() error {
	lock, err := tryLock(i.path("watchdog.lock"), lockExclusive)
	if lock == nil || err != nil {
		return err
	}
	// The watchdog inherits the lock, so the lock is held throughout.
	defer lock.unlock()
	executable, err := os.Executable()
	if err != nil {
		return fmt.Errorf("find own executable: %w", err)
	}
	_, err = i.spawn(command{
		name:    watchdogName,
		argv:    []string{executable, "localstack-watchdog", i.dir}, // the arguments are for ps only
		env:     append(os.Environ(), watchdogVar+"="+i.dir),
		dir:     "/",
		inherit: []*os.File{lock.file},
	})
	return err
}

// watch returns when the instance is stopped or kept.
func (i *instance) watch(lock *os.File) error {
	ticker := time.NewTicker(watchdogTick)
	defer ticker.Stop()
	var idleSince time.Time
	for now := range ticker.C {
		done, idle, err := i.look(lock, now, idleSince)
		if done || err != nil {
			return err
		}
		if !idle {
			idleSince = time.Time{}
		} else if idleSince.IsZero() {
			idleSince = now
		}
	}
	return nil
}

// look is a round of watch. idle reports that nobody uses the servers. It stops them
// if they were idle for long enough.
func (i *instance) look(lock *os.File, now, idleSince time.Time) (done, idle bool, err error) {
	// Do not wait for start.lock: its holder is about to use the servers.
	start, err := tryLock(i.path("start.lock"), lockExclusive)
	if start == nil || err != nil {
		return false, false, err
	}
	defer start.unlock()
	i.readState()
	if i.state.Keep {
		return true, false, i.retire(lock)
	}
	use, err := tryLock(i.path("use.lock"), lockExclusive)
	if use == nil || err != nil {
		return false, false, err
	}
	defer use.unlock()
	if idleSince.IsZero() || now.Sub(idleSince) < max(i.state.Linger, minLinger) {
		return false, true, nil
	}
	return true, true, errors.Join(i.stopServers(), i.retire(lock))
}

// retire ends the watch. The caller must hold start.lock: the next user must not mistake
// a watchdog that is about to exit for a running one.
func (i *instance) retire(lock *os.File) error {
	return errors.Join(os.Remove(i.recordPath(watchdogName)), lock.Close())
}
