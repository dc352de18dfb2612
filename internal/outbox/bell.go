package outbox

import (
	"context"
	"sync/atomic"
	"time"

	"example.com/shop/internal/session"
	"github.com/jackc/pgx/v5"
)

// Channel is the Postgres notification channel of the doorbell.
const Channel = "outbox"

// Bell tells the relay that there may be something new. Ring never blocks, and any number of rings may become one:
// the relay reads until nothing is left, so all that counts is that a ring follows the last commit.
type Bell interface {
	Ring()
}

// LocalBell is the doorbell of a relay in the same process, and what the relay itself waits on.
type LocalBell chan struct{}

// NewLocalBell makes a LocalBell.
func NewLocalBell() LocalBell { return make(LocalBell, 1) }

// Ring wakes the relay, now or when it next looks.
func (b LocalBell) Ring() {
	select {
	case b <- struct{}{}:
	default: // one ring is waiting already, and it will be heard after this commit
	}
}

// NotifyBell rings a relay in another process by NOTIFY. It does so outside of business transactions, on a connection
// of its own: a NOTIFY inside a transaction takes a lock over the whole cluster at commit and costs writers half of
// their throughput.
type NotifyBell struct {
	local LocalBell
	rings atomic.Int64
	url   string
}

// NewNotifyBell makes a bell for the database at url. It rings only while Run runs.
func NewNotifyBell(url string) *NotifyBell {
	return &NotifyBell{local: NewLocalBell(), url: url}
}

// Ring asks for a notification.
func (b *NotifyBell) Ring() {
	b.rings.Add(1)
	b.local.Ring()
}

// The least time between two notifications of one process, which commits within it share. It doubles while they come
// faster than one in busyGap: then the relay is busy, and looks at the log again every few milliseconds by itself
// (minPoll).
const (
	minNotifyInterval = 2 * time.Millisecond
	maxNotifyInterval = 32 * time.Millisecond
	busyGap           = 3 * time.Millisecond
)

// A transaction that only notifies has written nothing that could be lost, so Postgres commits it without waiting for
// the disk. As a command by itself NOTIFY needs no plan, and is heard in half the time that it takes SELECT pg_notify
// (measured).
const notifySQL = `NOTIFY ` + Channel

// Run passes rings on until ctx is done. Failures only cost latency, since the relay polls as well: they are logged and
// tried again.
func (b *NotifyBell) Run(ctx context.Context) {
	session.Keep(ctx, b.url, "doorbell", func(conn *pgx.Conn) error {
		interval := minNotifyInterval
		for {
			select {
			case <-ctx.Done():
				return ctx.Err()
			case <-b.local:
			}
			b.rings.Store(0)
			if _, err := conn.Exec(ctx, notifySQL); err != nil {
				b.Ring() // for the next connection
				return err
			}
			wait(ctx, nil, interval)
			interval = nextInterval(interval, b.rings.Load())
		}
	})
}

func nextInterval(last time.Duration, rings int64) time.Duration {
	if time.Duration(rings)*busyGap < last {
		return minNotifyInterval
	}
	return min(2*last, maxNotifyInterval)
}

// leaseNews is the payload of a notification that a shard has become free.
const leaseNews = "lease"
