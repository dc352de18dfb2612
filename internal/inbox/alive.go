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

// heartbeatInterval is the time between two heartbeats. After three missing heartbeats a consumer counts as gone.
const heartbeatInterval = time.Second

// stats are what a consumer reports with its heartbeats.
type stats struct {
	mu      sync.Mutex
	applied int64
	lag     *float64
}

// record counts messages whose effect is committed. The lag is the age of the last one, if its ID contains a time.
func (s *stats) record(applied int, last identity) {
	if applied == 0 {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.applied += int64(applied)
	if last.slot != foreignSlot {
		lag := max(0, time.Since(last.createdAt()).Seconds())
		s.lag = &lag
	}
}

func (s *stats) read() (applied int64, lag *float64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.applied, s.lag
}

const heartbeatSQL = `
INSERT INTO inbox_consumer (consumer, owner, applied, lag, expires_at, lease)
VALUES ($1, $2, $3, $4, clock_timestamp() + $5, $5)
ON CONFLICT (consumer, owner) DO UPDATE
SET applied = excluded.applied, lag = excluded.lag, expires_at = excluded.expires_at, lease = excluded.lease`

// Also deletes the rows of processes that could not do so themselves.
const deleteConsumerSQL = `
DELETE FROM inbox_consumer WHERE consumer = $1 AND (owner = $2 OR NOT clock_within(expires_at, interval '1 hour'))`

// heartbeat reports to operators that this consumer is alive and what it has done, until ctx is done.
func (b *Inbox) heartbeat(ctx context.Context) {
	host, _ := os.Hostname()
	owner := fmt.Sprintf("%s/%d/%s", host, os.Getpid(), uuid.NewString()[:8])
	for ctx.Err() == nil {
		applied, lag := b.stats.read()
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
	_, err := b.db.Exec(ctx, deleteConsumerSQL, b.group.name, owner)
	if err != nil {
		slog.DebugContext(ctx, "consumer stays listed for a few seconds", "consumer", b.group.name, "error", err)
	}
}
