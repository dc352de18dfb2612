//go:build unix

package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

const (
	// watchInterval is short, because it bounds the precision of recovery times.
	watchInterval = 100 * time.Millisecond
	// recoveryPatience bounds the time until the service has recovered from a fault.
	recoveryPatience = 30 * time.Second
	// settlePatience bounds the wait after the load, stallPatience the time without any progress during that wait.
	settlePatience = 2 * time.Minute
	stallPatience  = 10 * time.Second
)

// watch samples the tables while the load runs.
type watch struct {
	db *pgxpool.Pool
	// orders contains the IDs to count in a database with other orders. Nil means all.
	orders []string
}

// sample is the state of the tables at a moment.
type sample struct {
	Messages  int   // committed to the outbox
	Published int   // confirmed by the broker
	Parked    int   // parked by the relay
	Epoch     int64 // of the relay's lease
	Applied   int   // taken by a consumer group; every message of the demo has exactly one group
	Retrying  int
	Open      int // orders without final state
}

func (s sample) backlog() int { return s.Messages - s.Parked - s.Applied }

// quiet reports whether every committed message is published and applied.
func (s sample) quiet() bool { return s.Published+s.Parked == s.Messages && s.backlog() == 0 }

const sampleSQL = `
SELECT (SELECT count(*) FROM outbox) AS messages, cursor.published, cursor.parked, cursor.epoch,
       (SELECT count(*) FROM inbox) AS applied, (SELECT count(*) FROM inbox_retry) AS retrying,
       (SELECT count(*) FROM orders WHERE status = 'placed') AS open
FROM outbox_cursor AS cursor WHERE shard = 0`

// sampleOfSQL does the same for some orders. The relay's counters cover all messages, so this statement counts the rows
// that the cursor has passed: those that are visible in it, as the outbox defines it. Among them are the messages that
// the relay parked. They are dead letters.
const sampleOfSQL = `
WITH ours AS (SELECT message_id, shard, xid, id FROM outbox WHERE key = ANY($1)),
     parked AS (SELECT count(*) AS n FROM dead_letter WHERE consumer = '' AND key = ANY($1)),
     passed AS (
         SELECT count(*) AS n FROM ours JOIN outbox_cursor AS cursor USING (shard)
         WHERE pg_visible_in_snapshot(xid, delivered)
            OR batch IS NOT NULL AND id <= last_id AND pg_visible_in_snapshot(xid, batch))
SELECT (SELECT count(*) FROM ours) AS messages, passed.n - parked.n AS published, parked.n AS parked,
       0::bigint AS epoch,
       (SELECT count(*) FROM inbox JOIN ours USING (message_id)) AS applied,
       (SELECT count(*) FROM inbox_retry WHERE key = ANY($1)) AS retrying,
       (SELECT count(*) FROM orders WHERE status = 'placed' AND id = ANY($1::uuid[])) AS open
FROM passed, parked`

func (w *watch) sample(ctx context.Context) (sample, error) {
	sql, args := sampleSQL, []any(nil)
	if w.orders != nil {
		sql, args = sampleOfSQL, []any{w.orders}
	}
	rows, _ := w.db.Query(ctx, sql, args...) // CollectExactlyOneRow returns its error
	now, err := pgx.CollectExactlyOneRow(rows, pgx.RowToStructByName[sample])
	if err != nil {
		return sample{}, fmt.Errorf("sample the tables: %w", err)
	}
	return now, nil
}

// run shows a sample at every interval until ctx is done.
func (w *watch) run(ctx context.Context, show func(sample)) {
	ticker := time.NewTicker(watchInterval)
	defer ticker.Stop()
	for {
		if now, err := w.sample(ctx); err == nil {
			show(now)
		}
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
	}
}

var errNoRecovery = errors.New("no recovery")

// await samples until reached is true, and returns that sample.
func (w *watch) await(ctx context.Context, patience time.Duration, reached func(sample) bool) (sample, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, patience, fmt.Errorf("%w within %s", errNoRecovery, patience))
	defer cancel()
	ticker := time.NewTicker(watchInterval / 2)
	defer ticker.Stop()
	for {
		now, err := w.sample(ctx)
		switch {
		case ctx.Err() != nil:
			return now, context.Cause(ctx)
		case err != nil:
			return now, err
		case reached(now):
			return now, nil
		}
		select {
		case <-ctx.Done():
		case <-ticker.C:
		}
	}
}

// settle waits until every message is published, seen by the tap and applied. It also returns if there is no more
// progress: the ledger then shows the missing messages.
func (w *watch) settle(ctx context.Context, tap *tap) error {
	var last sample
	moved := time.Now()
	_, err := w.await(ctx, settlePatience, func(now sample) bool {
		if now != last {
			last, moved = now, time.Now()
		}
		settled := now.quiet() && now.Retrying == 0 && now.Open == 0 &&
			tap.distinct() >= now.Published && tap.drained()
		return settled || tap.broken() || time.Since(moved) > stallPatience
	})
	if tap.broken() {
		return errors.New("the tap lost its connection to the broker, so the ledger would be incomplete")
	}
	if errors.Is(err, errNoRecovery) {
		return nil
	}
	return err
}
