package idempotency

import (
	"context"
	"sync"
)

// turns lets so many calls of each key go on at a time, in this process. The others of that key wait; those of another key do not.
type turns[K comparable] struct {
	each int

	mu    sync.Mutex
	taken map[K]*turn
}

// turn is what the calls of one key compete for.
type turn struct {
	free   chan struct{} // holds a token for each place that nobody has
	wanted int           // calls that have a place or wait for one; turns.mu guards it
}

func newTurns[K comparable](each int) *turns[K] { return &turns[K]{each: each, taken: map[K]*turn{}} }

// wait waits until it is the turn of a call.
func (t *turns[K]) wait(ctx context.Context, who K) (leave func(), err error) {
	t.mu.Lock()
	one := t.taken[who]
	if one == nil {
		one = &turn{free: make(chan struct{}, t.each)}
		for range t.each {
			one.free <- struct{}{}
		}
		t.taken[who] = one
	}
	one.wanted++
	t.mu.Unlock()
	select {
	case <-one.free:
		return func() {
			one.free <- struct{}{}
			t.forget(who, one)
		}, nil
	case <-ctx.Done():
		t.forget(who, one)
		return nil, ctx.Err()
	}
}

// forget removes a turn that nobody wants any more.
func (t *turns[K]) forget(who K, one *turn) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if one.wanted--; one.wanted == 0 {
		delete(t.taken, who)
	}
}
