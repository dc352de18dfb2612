package outbox

import (
	"fmt"
	"strings"
	"sync"
	"time"

	"example.com/shop/internal/messaging"
)

// silentAfter is how long the broker may confirm nothing before that counts as a problem. It is far longer than a
// confirm takes and far shorter than a timeout.
const silentAfter = 3 * time.Second

// problem is the reason that a shard is not being published, for operators. The run sets it, and the relay reports it
// with its heartbeat.
type problem struct {
	mu     sync.Mutex
	cause  error     // of the last failure; nil once a page was settled
	silent time.Time // when the oldest page that waits for verdicts was written; zero if none waits
}

func (p *problem) failed(cause error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.cause, p.silent = cause, time.Time{}
}

// settled records that the broker gave its verdicts on a page. waiting are the pages still in flight, oldest first.
func (p *problem) settled(waiting []flight) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.cause, p.silent = nil, time.Time{}
	if len(waiting) > 0 {
		p.silent = waiting[0].written
	}
}

// wrote records that a page was written. The page is the oldest in flight if no other page waits.
func (p *problem) wrote(at time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.silent.IsZero() {
		p.silent = at
	}
}

// text returns the problem in one line, or "" if there is none.
func (p *problem) text(now time.Time) string {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case p.cause != nil:
		line := strings.Join(strings.Fields(messaging.CleanText(p.cause.Error())), " ")
		return strings.TrimPrefix(line, errBroker.Error()+": ")
	case !p.silent.IsZero() && now.Sub(p.silent) > silentAfter:
		return fmt.Sprintf("the broker has confirmed nothing for %s; it may have blocked publishers (memory or disk "+
			"alarm)",
			now.Sub(p.silent).Round(time.Second))
	}
	return ""
}

// problem returns the reason that this relay is not publishing: the problem of any shard that has one.
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
