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

// untold are the runs that this process claimed, that charge their message with a crash, and that did not end so: the
// database was away, or the answer to a COMMIT was lost, or the claim ran out.
type untold struct {
	mu   sync.Mutex
	runs []retry
}

func (u *untold) add(one retry) {
	u.mu.Lock()
	defer u.mu.Unlock()
	one.Delivery.Payload, one.Delivery.Headers = nil, nil // they may be large, and the wait long
	u.runs = append(u.runs, one)
}

func (u *untold) all() []retry {
	u.mu.Lock()
	defer u.mu.Unlock()
	return slices.Clone(u.runs)
}

func (u *untold) drop(one retry) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.runs = slices.DeleteFunc(u.runs, func(other retry) bool { return other.run == one.run })
}

// A row that is locked by another says nothing yet: a handler runs on it, which is not to be waited for; or the COMMIT
// of the claim itself is still under way. Once the row is locked here, no claim of it is open. The update then sees the
// newest version of the row, also if that is younger than its snapshot. All of this may be repeated, whatever became of
// an answer, and need not be durable, like the claim.
const takeBackSQL = `
WITH hasty AS MATERIALIZED (SELECT set_config('synchronous_commit', 'off', true)),
settled AS (SELECT seq FROM inbox_retry WHERE seq = $1 FOR UPDATE SKIP LOCKED),
freed AS (
    UPDATE inbox_retry AS retry SET runs = array_remove(runs, $2),
        due_at = CASE WHEN runs[cardinality(runs)] = $2 THEN clock_timestamp() ELSE due_at END
    FROM hasty, settled WHERE retry.seq = settled.seq)
SELECT EXISTS (SELECT FROM settled) OR NOT EXISTS (SELECT FROM inbox_retry WHERE seq = $1)`

// takeBack takes back the runs that were broken off, which was not the fault of their messages.
func (b *Inbox) takeBack(ctx context.Context) error {
	for _, one := range b.untold.all() {
		var told bool
		if err := b.db.QueryRow(ctx, takeBackSQL, one.seq, one.run).Scan(&told); err != nil {
			return postgres.Classify(fmt.Errorf("take back retry: %w", err))
		}
		if told {
			b.untold.drop(one)
		}
	}
	return nil
}

// disown takes back a run at once if that can be done: else as soon as the database answers again.
func (b *Inbox) disown(ctx context.Context, one retry) {
	if one.seq == 0 { // not claimed
		return
	}
	b.untold.add(one)
	b.leave(ctx)
}

// leave takes back what is left, also when ctx is done. It waits for a moment for rows that are locked: this process
// may have broken off the run itself, and Postgres not noticed yet. A run that cannot be taken back before its process
// ends is taken for a crash.
func (b *Inbox) leave(ctx context.Context) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Second)
	defer cancel()
	for {
		err := b.takeBack(ctx)
		if err == nil && len(b.untold.all()) == 0 {
			return
		}
		if err != nil || ctx.Err() != nil {
			slog.WarnContext(ctx, "retry not taken back yet", "consumer", b.group.name, "error", err)
			return
		}
		select {
		case <-ctx.Done():
		case <-time.After(20 * time.Millisecond):
		}
	}
}
