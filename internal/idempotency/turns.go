package idempotency

import (
	"context"
	"sync"
)

// turns lets one call of each account go on at a time, in this process.
type turns struct {
	mu    sync.Mutex
	taken map[account]*turn
}

// turn is the place that the calls of one account compete for.
type turn struct {
	free   chan struct{} // holds one token while nobody has the turn
	wanted int           // calls that have it or wait for it; turns.mu guards it
}

// wait waits until it is the turn of a call.
func (t *turns) wait(ctx context.Context, who account) (leave func(), err error) {
	t.mu.Lock()
	one := t.taken[who]
	if one == nil {
		one = &turn{free: make(chan struct{}, 1)}
		one.free <- struct{}{}
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
func (t *turns) forget(who account, one *turn) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if one.wanted--; one.wanted == 0 {
		delete(t.taken, who)
	}
}
