package inbox

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"time"

	"github.com/google/uuid"
)

// signInterval is the time between two signs of life; after three that are missing, a consumer counts as gone.
const signInterval = time.Second

// progress is what a consumer tells with its signs of life.
type progress struct {
	mu      sync.Mutex
	applied int64
	lag     *float64
}

// note counts messages whose effect is committed. The lag is that of the last one, if its ID has a time.
func (p *progress) note(applied int, last identity) {
	if applied == 0 {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.applied += int64(applied)
	if last.slot != foreignSlot {
		lag := max(0, time.Since(last.born()).Seconds())
		p.lag = &lag
	}
}

func (p *progress) read() (applied int64, lag *float64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.applied, p.lag
}

const aliveSQL = `
INSERT INTO inbox_consumer (consumer, owner, applied, lag, expires_at, lease) VALUES ($1, $2, $3, $4, clock_timestamp() + $5, $5)
ON CONFLICT (consumer, owner) DO UPDATE
SET applied = excluded.applied, lag = excluded.lag, expires_at = excluded.expires_at, lease = excluded.lease`

const goneSQL = `DELETE FROM inbox_consumer WHERE consumer = $1 AND (owner = $2 OR NOT clock_within(expires_at, interval '1 hour'))`

// heartbeat tells operators that this consumer is at work and what it has done, until ctx is done.
func (b *Inbox) heartbeat(ctx context.Context) {
	host, _ := os.Hostname()
	owner := fmt.Sprintf("%s/%d/%s", host, os.Getpid(), uuid.NewString()[:8])
	for ctx.Err() == nil {
		applied, lag := b.progress.read()
		if _, err := b.db.Exec(ctx, aliveSQL, b.group.name, owner, applied, lag, 3*signInterval); err != nil && ctx.Err() == nil {
			slog.DebugContext(ctx, "sign of life not written", "consumer", b.group.name, "error", err)
		}
		select {
		case <-ctx.Done():
		case <-time.After(signInterval):
		}
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Second)
	defer cancel()
	// With those that left nobody to do this for them.
	_, err := b.db.Exec(ctx, goneSQL, b.group.name, owner)
	if err != nil {
		slog.DebugContext(ctx, "consumer stays listed for some seconds", "consumer", b.group.name, "error", err)
	}
}
