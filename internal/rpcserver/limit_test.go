package rpcserver

import (
	"fmt"
	"testing"
	"time"

	"example.com/shop/internal/auth"
)

// These tests use the table and the buckets directly, with synthetic time.

func TestBucketFillsAtTheRate(t *testing.T) {
	t.Parallel()
	l, now := newLimiter(LimitConfig{Rate: 10, Burst: 3}), time.Unix(0, 0)
	enter := func() time.Duration {
		_, wait := l.enter("ann", now)
		return wait
	}
	for i := range 3 {
		if wait := enter(); wait != 0 {
			t.Errorf("call %d of the burst must wait %s", i, wait)
		}
	}
	for range 100 { // refused calls cost nothing
		if wait := enter(); wait != 100*time.Millisecond {
			t.Errorf("call after the burst must wait %s", wait)
		}
	}
	if _, wait := l.enter("bob", now); wait != 0 {
		t.Errorf("another caller must wait %s", wait)
	}
	now = now.Add(100 * time.Millisecond)
	if wait := enter(); wait != 0 {
		t.Errorf("after the returned wait, a call must wait %s", wait)
	}
	if wait := enter(); wait != 100*time.Millisecond {
		t.Errorf("the next call must wait %s, want 100 ms", wait)
	}
	now = now.Add(-time.Hour) // the clock is set back
	if wait := enter(); wait > 200*time.Millisecond {
		t.Errorf("after the clock was set back, a call must wait %s", wait)
	}
}

func TestEndedCallsFreeTheirPlaces(t *testing.T) {
	t.Parallel()
	l, now := newLimiter(LimitConfig{Concurrent: 2}), time.Unix(0, 0)
	first, _ := l.enter("ann", now)
	second, _ := l.enter("ann", now)
	if _, wait := l.enter("ann", now); wait == 0 {
		t.Error("a third call was admitted")
	}
	if other, wait := l.enter("bob", now); wait != 0 {
		t.Error("another caller was refused")
	} else {
		l.leave(other)
	}
	l.leave(first)
	if _, wait := l.enter("ann", now); wait != 0 {
		t.Error("a call was refused although a place was free")
	}
	l.leave(second)
}

// A flood of names uses bounded memory, and does not evict a caller that is at its limit.
func TestTableOfCallersIsBounded(t *testing.T) {
	t.Parallel()
	l, now := newLimiter(LimitConfig{Rate: 1, Burst: 2, MaxCallers: 100}), time.Unix(1e9, 0)
	for range 2 {
		if _, wait := l.enter("ann", now); wait != 0 {
			t.Fatal("a call of the burst was refused")
		}
	}
	admitted := 0
	for i := range 10_000 {
		if mine, wait := l.enter(fmt.Sprint("flood ", i), now); wait == 0 {
			admitted++
			l.leave(mine)
		}
	}
	if len(l.callers) > 100 {
		t.Errorf("table has %d callers", len(l.callers))
	}
	if want := 99 + 2; admitted != want { // the callers that fit, and the burst of the shared account
		t.Errorf("%d calls of the flood were admitted, want %d", admitted, want)
	}
	if _, wait := l.enter("ann", now); wait == 0 {
		t.Error("the flood evicted a caller that is at its limit")
	}
	now = now.Add(time.Minute)
	mine, wait := l.enter("new", now)
	if wait != 0 || mine == l.rest || len(l.callers) > 2 { // ann's calls are still running
		t.Errorf("after a pause: wait %s, shared account %t, %d callers", wait, mine == l.rest, len(l.callers))
	}
}

func TestAccount(t *testing.T) {
	t.Parallel()
	for peer, want := range map[string]string{
		"192.0.2.1:1234": "192.0.2.1", "192.0.2.1:5": "192.0.2.1",
		"[2001:db8:1:2:3:4:5:6]:1": "2001:db8:1:2::/64", "[2001:db8:1:2::1]:1": "2001:db8:1:2::/64",
		"[::ffff:192.0.2.1]:1": "::ffff:192.0.2.1", "": "", "pipe": "pipe",
	} {
		if got := account(auth.Visit(t.Context()), peer); got != want {
			t.Errorf("%s: got %s, want %s", peer, got, want)
		}
	}
}
