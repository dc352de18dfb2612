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

// abortedRuns are runs that this process claimed and that did not reach a result, although the process survived: the
// database was unavailable, the answer to a COMMIT was lost, or the claim expired. Until such a run is removed from
// inbox_retry, it counts as a crash.
type abortedRuns struct {
	mu   sync.Mutex
	runs []retry
}

func (a *abortedRuns) add(r retry) {
	a.mu.Lock()
	defer a.mu.Unlock()
	r.Delivery.Payload, r.Delivery.Headers = nil, nil // they may be large, and may stay here for long
	a.runs = append(a.runs, r)
}

func (a *abortedRuns) all() []retry {
	a.mu.Lock()
	defer a.mu.Unlock()
	return slices.Clone(a.runs)
}

func (a *abortedRuns) drop(r retry) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.runs = slices.DeleteFunc(a.runs, func(other retry) bool { return other.run == r.run })
}

// The statement skips a row that another session has locked: either a handler runs on it, which this process must not
// wait for, or the COMMIT of the claim itself is still in progress. Once this statement has locked the row, no claim of
// it is open, and the update sees the newest version of the row, even if that is younger than the statement's snapshot.
// The statement can be repeated if its answer is lost. Like the claim, it need not be durable.
const undoRunSQL = `
WITH async_commit AS MATERIALIZED (SELECT set_config('synchronous_commit', 'off', true)),
settled AS (SELECT seq FROM inbox_retry WHERE seq = $1 FOR UPDATE SKIP LOCKED),
freed AS (
    UPDATE inbox_retry AS retry SET runs = array_remove(runs, $2),
        due_at = CASE WHEN runs[cardinality(runs)] = $2 THEN clock_timestamp() ELSE due_at END
    FROM async_commit, settled WHERE retry.seq = settled.seq)
SELECT EXISTS (SELECT FROM settled) OR NOT EXISTS (SELECT FROM inbox_retry WHERE seq = $1)`

// undoRuns removes aborted runs from inbox_retry, because their messages did not cause a crash.
func (b *Inbox) undoRuns(ctx context.Context) error {
	for _, r := range b.aborted.all() {
		var undone bool
		if err := b.db.QueryRow(ctx, undoRunSQL, r.seq, r.run).Scan(&undone); err != nil {
			return postgres.Classify(fmt.Errorf("undo run: %w", err))
		}
		if undone {
			b.aborted.drop(r)
		}
	}
	return nil
}

// abort undoes a run at once if possible, and otherwise as soon as the database answers again.
func (b *Inbox) abort(ctx context.Context, r retry) {
	if r.seq == 0 { // not claimed
		return
	}
	b.aborted.add(r)
	b.undoRunsNow(ctx)
}

// undoRunsNow undoes all aborted runs, even if ctx is done. It waits up to two seconds for locked rows: this process
// may have interrupted the run itself, and Postgres may not have noticed yet. If the process ends before a run is
// undone, the run counts as a crash.
func (b *Inbox) undoRunsNow(ctx context.Context) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Second)
	defer cancel()
	for {
		err := b.undoRuns(ctx)
		if err == nil && len(b.aborted.all()) == 0 {
			return
		}
		if err != nil || ctx.Err() != nil {
			slog.WarnContext(ctx, "aborted run not undone yet", "consumer", b.group.name, "error", err)
			return
		}
		select {
		case <-ctx.Done():
		case <-time.After(20 * time.Millisecond):
		}
	}
}
