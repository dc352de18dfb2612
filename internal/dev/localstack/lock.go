//go:build unix

package localstack

import (
	"context"
	"errors"
	"fmt"
	"os"
	"syscall"
	"time"
)

// lockPoll is the interval between attempts to lock. A blocking flock could not be
// interrupted by a context.
const lockPoll = 50 * time.Millisecond

// fileLock is a held flock(2). It belongs to the open file and not to the process: a
// child that inherits the file holds the lock too, and the kernel drops it when the
// last process with the open file ends, for any reason.
//
// Never delete lock files: a second process could lock a new file of the same name
// while the first still holds the old one.
type fileLock struct{ file *os.File }

// lockShared and lockExclusive are the two kinds of flock.
const (
	lockShared    = syscall.LOCK_SH
	lockExclusive = syscall.LOCK_EX
)

// tryLock takes the lock, or returns nil if another lock conflicts with it.
func tryLock(path string, how int) (*fileLock, error) {
	file, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, fmt.Errorf("open lock: %w", err)
	}
	if err := syscall.Flock(int(file.Fd()), how|syscall.LOCK_NB); err != nil {
		file.Close()
		if errors.Is(err, syscall.EWOULDBLOCK) {
			return nil, nil
		}
		return nil, fmt.Errorf("lock %s: %w", path, err)
	}
	return &fileLock{file}, nil
}

// waitLock takes the lock as soon as it is free.
func waitLock(ctx context.Context, path string, how int) (*fileLock, error) {
	ticker := time.NewTicker(lockPoll)
	defer ticker.Stop()
	for {
		if lock, err := tryLock(path, how); lock != nil || err != nil {
			return lock, err
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("wait for lock %s: %w", path, ctx.Err())
		case <-ticker.C:
		}
	}
}

// unlock releases the lock, unless a child inherited it.
func (l *fileLock) unlock() { l.file.Close() }
