package idempotency

import (
	"context"
	"sync"
)

// turns limits the calls of each key that run at a time in this process. Further calls of that key wait. Calls of other
// keys do not.
type turns[K comparable] struct {
	each int

	mu    sync.Mutex
	taken map[K]*turn
}

// turn is the set of places of one key.
type turn struct {
	free   chan struct{} // one token per free place
	wanted int           // calls that have a place or wait for one; guarded by turns.mu
}

func newTurns[K comparable](each int) *turns[K] { return &turns[K]{each: each, taken: map[K]*turn{}} }

// wait waits for a free place of the key. The caller must call leave to free the place.
func (t *turns[K]) wait(ctx context.Context, key K) (leave func(), err error) {
	t.mu.Lock()
	places := t.taken[key]
	if places == nil {
		places = &turn{free: make(chan struct{}, t.each)}
		for range t.each {
			places.free <- struct{}{}
		}
		t.taken[key] = places
	}
	places.wanted++
	t.mu.Unlock()
	select {
	case <-places.free:
		return func() {
			places.free <- struct{}{}
			t.release(key, places)
		}, nil
	case <-ctx.Done():
		t.release(key, places)
		return nil, ctx.Err()
	}
}

// release gives up a call's interest in a turn, and deletes the turn if no other call wants it.
func (t *turns[K]) release(key K, places *turn) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if places.wanted--; places.wanted == 0 {
		delete(t.taken, key)
	}
}
