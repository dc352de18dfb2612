package inbox

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"example.com/shop/internal/postgres"
)

// unsettledRuns are runs that this process claimed and survived, and whose records still count as crashes: the database
// was away, the answer to a COMMIT was lost, or the claim expired.
type unsettledRuns struct {
	mu   sync.Mutex
	runs []retry
}

func (u *unsettledRuns) add(r retry) {
	u.mu.Lock()
	defer u.mu.Unlock()
	r.Delivery.Payload, r.Delivery.Headers = nil, nil // may be large, and are not needed
	u.runs = append(u.runs, r)
}

func (u *unsettledRuns) all() []retry {
	u.mu.Lock()
	defer u.mu.Unlock()
	return slices.Clone(u.runs)
}

func (u *unsettledRuns) drop(r retry) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.runs = slices.DeleteFunc(u.runs, func(other retry) bool { return other.run == r.run })
}

// Skips a row that another transaction has locked: a handler runs on it, or the COMMIT of the claim is still under way.
// Once this statement has locked the row, no claim of it is open, and the update sees the newest version even if that
// is younger than the snapshot. The statement may be repeated, and like the claim it need not be durable.
const withdrawSQL = `
WITH no_sync AS MATERIALIZED (SELECT set_config('synchronous_commit', 'off', true)),
settled AS (SELECT seq FROM inbox_retry WHERE seq = $1 FOR UPDATE SKIP LOCKED),
freed AS (
    UPDATE inbox_retry AS retry SET runs = array_remove(runs, $2),
        due_at = CASE WHEN runs[cardinality(runs)] = $2 THEN clock_timestamp() ELSE due_at END
    FROM no_sync, settled WHERE retry.seq = settled.seq)
SELECT EXISTS (SELECT FROM settled) OR NOT EXISTS (SELECT FROM inbox_retry WHERE seq = $1)`

// withdraw removes the records of unsettled runs, so that they do not count as crashes.
func (b *Inbox) withdraw(ctx context.Context) error {
	for _, r := range b.unsettled.all() {
		var settled bool
		if err := b.db.QueryRow(ctx, withdrawSQL, r.seq, r.run).Scan(&settled); err != nil {
			return postgres.Classify(fmt.Errorf("withdraw retry: %w", err))
		}
		if settled {
			b.unsettled.drop(r)
		}
	}
	return nil
}

// giveUp withdraws a run now if it can, and otherwise when the database answers again.
func (b *Inbox) giveUp(ctx context.Context, r retry) {
	if r.seq == 0 { // not claimed
		return
	}
	b.unsettled.add(r)
	b.leave(ctx)
}

// leave withdraws the remaining runs, even after ctx is done. It waits up to 2 s for locked rows: this process may have
// aborted the run itself, and Postgres may not have noticed yet. A run that is not withdrawn before its process ends
// counts as a crash.
func (b *Inbox) leave(ctx context.Context) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Second)
	defer cancel()
	for {
		err := b.withdraw(ctx)
		if err == nil && len(b.unsettled.all()) == 0 {
			return
		}
		if err != nil || ctx.Err() != nil {
			slog.WarnContext(ctx, "retry not withdrawn yet", "consumer", b.group.name, "error", err)
			return
		}
		select {
		case <-ctx.Done():
		case <-time.After(20 * time.Millisecond):
		}
	}
}
