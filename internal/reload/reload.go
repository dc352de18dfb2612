// Package reload caches a value that is read from files, and reads it again when they change.
//
// It is a package of its own because auth (keys) and rpcserver (certificates) share it.
//
// It needs no goroutine: Get checks the files for changes, at most once a second. If the files cannot be read or used,
// for example because a certificate has changed and its key has not, the value stays as it is. Get tries again at the
// next check, and logs each problem once.
package reload

import (
	"fmt"
	"log/slog"
	"os"
	"slices"
	"sync"
	"time"
)

// interval is the least time between two checks. One stat per second costs nothing, and nobody rotates keys faster.
const interval = time.Second

// Value is a value that is read from files. It is safe for concurrent use.
type Value[T any] struct {
	load  func() (T, error)
	paths []string

	mu       sync.Mutex
	value    T
	stamps   []stamp
	checked  time.Time
	reported string // the last error that was logged
}

// stamp identifies the content of a file. It also changes when Kubernetes swaps a symbolic link.
type stamp struct {
	modified time.Time
	size     int64
}

// New reads the value for the first time, which must succeed. load reads the files at paths.
func New[T any](load func() (T, error), paths ...string) (*Value[T], error) {
	v := &Value[T]{load: load, paths: paths, checked: time.Now()}
	var err error
	if v.stamps, err = v.stat(); err != nil {
		return nil, err
	}
	if v.value, err = load(); err != nil {
		return nil, err
	}
	return v, nil
}

// Get returns the value of the files as they are now. If they cannot be used, it returns the last usable value.
func (v *Value[T]) Get() T {
	v.mu.Lock()
	defer v.mu.Unlock()
	if time.Since(v.checked) < interval {
		return v.value
	}
	v.checked = time.Now()
	if err := v.refresh(); err != nil && err.Error() != v.reported {
		v.reported = err.Error()
		slog.Warn("changed files cannot be used; their previous content stays in use", "paths", v.paths, "error", err)
	}
	return v.value
}

func (v *Value[T]) refresh() error {
	stamps, err := v.stat()
	if err != nil || slices.Equal(stamps, v.stamps) {
		return err
	}
	value, err := v.load()
	if err != nil {
		return err // and keep the old stamps, so that the next check tries again
	}
	v.value, v.stamps, v.reported = value, stamps, ""
	slog.Info("reloaded changed files", "paths", v.paths)
	return nil
}

// stat must be called before the files are read, so that the next check notices a change in between.
func (v *Value[T]) stat() ([]stamp, error) {
	var stamps []stamp
	for _, path := range v.paths {
		info, err := os.Stat(path)
		if err != nil {
			return nil, fmt.Errorf("check file for changes: %w", err)
		}
		stamps = append(stamps, stamp{info.ModTime(), info.Size()})
	}
	return stamps, nil
}
