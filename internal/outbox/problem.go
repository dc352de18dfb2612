package outbox

import (
	"fmt"
	"strings"
	"sync"
	"time"

	"example.com/shop/internal/messaging"
)

// silentAfter is how long the broker may confirm nothing before that counts as problem: far longer than it takes, far shorter than a timeout.
const silentAfter = 3 * time.Second

// problem is what keeps a shard from being published, for operators. The run sets it, and the relay tells of it with its sign of life.
type problem struct {
	mu     sync.Mutex
	cause  error     // of the last failure, nil once something got through
	silent time.Time // since when what was published waits for a verdict, zero if nothing does
}

func (t *problem) failed(cause error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.cause, t.silent = cause, time.Time{}
}

// heard notes that the broker gave its verdict, and since when the oldest page waits that is still in flight.
func (t *problem) heard(waiting []flight) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.cause, t.silent = nil, time.Time{}
	if len(waiting) > 0 {
		t.silent = waiting[0].written
	}
}

// wrote notes that a page was written; it is the oldest in flight if no other waits.
func (t *problem) wrote(at time.Time) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.silent.IsZero() {
		t.silent = at
	}
}

// text is the problem in one line, "" if there is none.
func (t *problem) text(now time.Time) string {
	t.mu.Lock()
	defer t.mu.Unlock()
	switch {
	case t.cause != nil:
		return strings.TrimPrefix(strings.Join(strings.Fields(messaging.CleanText(t.cause.Error())), " "), errBroker.Error()+": ")
	case !t.silent.IsZero() && now.Sub(t.silent) > silentAfter:
		return fmt.Sprintf("the broker has confirmed nothing for %s; it may have blocked publishers (memory or disk alarm)", now.Sub(t.silent).Round(time.Second))
	}
	return ""
}

// problem is what keeps this relay from publishing: the problem of the first of its shards that has any.
func (r *Relay) problem() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, held := range r.leases {
		if text := held.problem.text(time.Now()); text != "" && held.leads.Load() {
			return text
		}
	}
	return ""
}
