// Package reload keeps a value that is read from files and reads it again when they change, as certificates and keys do.
//
// It needs no goroutine: who asks for the value also looks, at most once a second, whether the files are still the ones that it
// came from. Files that cannot be read or used, such as a certificate whose key has not been replaced yet, leave the value as it is;
// they are tried again and complained about once.
package reload

import (
	"fmt"
	"log/slog"
	"os"
	"slices"
	"sync"
	"time"
)

// interval is the time between two looks: a stat a second costs nothing, and nobody rotates keys faster.
const interval = time.Second

// Value is a value of files. Its methods may be called at any time.
type Value[T any] struct {
	load  func() (T, error)
	paths []string

	mu       sync.Mutex
	value    T
	stamps   []stamp
	looked   time.Time
	reported string // the last complaint, so that it is made once
}

// stamp tells one content of a file from another, also when Kubernetes swaps a symbolic link.
type stamp struct {
	modified time.Time
	size     int64
}

// New reads the value for the first time, which must succeed. load reads the files at paths.
func New[T any](load func() (T, error), paths ...string) (*Value[T], error) {
	v := &Value[T]{load: load, paths: paths, looked: time.Now()}
	var err error
	if v.stamps, err = v.look(); err != nil {
		return nil, err
	}
	if v.value, err = load(); err != nil {
		return nil, err
	}
	return v, nil
}

// Get returns the value of the files as they are now, or as they were when they could be used last.
func (v *Value[T]) Get() T {
	v.mu.Lock()
	defer v.mu.Unlock()
	if time.Since(v.looked) < interval {
		return v.value
	}
	v.looked = time.Now()
	if err := v.refresh(); err != nil && err.Error() != v.reported {
		v.reported = err.Error()
		slog.Warn("changed files cannot be used; what they held before stays in force", "paths", v.paths, "error", err)
	}
	return v.value
}

func (v *Value[T]) refresh() error {
	stamps, err := v.look()
	if err != nil || slices.Equal(stamps, v.stamps) {
		return err
	}
	value, err := v.load()
	if err != nil {
		return err // with the old stamps, so that it is tried again
	}
	v.value, v.stamps, v.reported = value, stamps, ""
	slog.Info("read changed files", "paths", v.paths)
	return nil
}

// look is called before the files are read: what changes in between is seen the next time.
func (v *Value[T]) look() ([]stamp, error) {
	var stamps []stamp
	for _, path := range v.paths {
		info, err := os.Stat(path)
		if err != nil {
			return nil, fmt.Errorf("look at file: %w", err)
		}
		stamps = append(stamps, stamp{info.ModTime(), info.Size()})
	}
	return stamps, nil
}
