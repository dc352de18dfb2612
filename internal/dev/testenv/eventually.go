//go:build unix

package testenv

import (
	"testing"
	"time"
)

const (
	firstPoll = 2 * time.Millisecond
	lastPoll  = 50 * time.Millisecond
)

// Eventually calls check until it returns nil. At the timeout it fails the test with
// the last error.
//
// Use it only for systems that cannot signal: a server, or another process. Wait for
// the code under test through channels, and test pure timing under testing/synctest.
func Eventually(t testing.TB, timeout time.Duration, check func() error) {
	t.Helper()
	poll := firstPoll
	for deadline := time.Now().Add(timeout); ; {
		err := check()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("still after %s: %v", timeout, err)
		}
		select {
		case <-t.Context().Done(): // the test's cleanup has begun
			t.Fatalf("test ended while waiting: %v", err)
		case <-time.After(poll):
		}
		poll = min(2*poll, lastPoll)
	}
}
