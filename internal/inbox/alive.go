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

// heartbeatInterval is the time between two heartbeats. After three missing ones a consumer counts as gone.
const heartbeatInterval = time.Second

// progress is what a consumer reports with its heartbeat.
type progress struct {
	mu      sync.Mutex
	applied int64
	lag     *float64
}

// note counts applied messages. The lag is that of the last one, if its ID contains a time.
func (p *progress) note(applied int, last identity) {
	if applied == 0 {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.applied += int64(applied)
	if last.slot != foreignSlot {
		lag := max(0, time.Since(last.created()).Seconds())
		p.lag = &lag
	}
}

func (p *progress) read() (applied int64, lag *float64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.applied, p.lag
}

const heartbeatSQL = `
INSERT INTO inbox_consumer (consumer, owner, applied, lag, expires_at, lease)
VALUES ($1, $2, $3, $4, clock_timestamp() + $5, $5)
ON CONFLICT (consumer, owner) DO UPDATE
SET applied = excluded.applied, lag = excluded.lag, expires_at = excluded.expires_at, lease = excluded.lease`

// Also deletes consumers that died without deleting themselves.
const leaveSQL = `
DELETE FROM inbox_consumer WHERE consumer = $1 AND (owner = $2 OR NOT clock_within(expires_at, interval '1 hour'))`

// heartbeat reports to operators that this consumer runs, and its progress, until ctx is done.
func (b *Inbox) heartbeat(ctx context.Context) {
	host, _ := os.Hostname()
	owner := fmt.Sprintf("%s/%d/%s", host, os.Getpid(), uuid.NewString()[:8])
	for ctx.Err() == nil {
		applied, lag := b.progress.read()
		_, err := b.db.Exec(ctx, heartbeatSQL, b.group.name, owner, applied, lag, 3*heartbeatInterval)
		if err != nil && ctx.Err() == nil {
			slog.DebugContext(ctx, "heartbeat not written", "consumer", b.group.name, "error", err)
		}
		select {
		case <-ctx.Done():
		case <-time.After(heartbeatInterval):
		}
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Second)
	defer cancel()
	_, err := b.db.Exec(ctx, leaveSQL, b.group.name, owner)
	if err != nil {
		slog.DebugContext(ctx, "consumer stays listed for some seconds", "consumer", b.group.name, "error", err)
	}
}
