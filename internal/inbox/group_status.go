package inbox

import (
	"context"
	"fmt"
	"time"

	"example.com/shop/internal/postgres"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

// GroupStatus is the status of a consumer group.
type GroupStatus struct {
	Consumer string
	// Paused says who paused the group and why; nil if it is not paused.
	Paused *PausedBy
	// Applied is the number of messages that each process has applied since it started, by the name of the process. It
	// contains every process that runs the group, even a paused group.
	Applied map[string]int64
	// Lag is the age in seconds that the last applied message of a process had, the largest of all processes; nil before
	// the first message.
	Lag *float64
	// Retrying is the number of messages in inbox_retry, Blocked the number of keys whose messages wait for the first of
	// them, and Oldest for how many seconds the oldest message has waited.
	Retrying, Blocked int64
	Oldest            float64
}

// PausedBy describes a pause.
type PausedBy struct {
	Actor, Reason string
	At            time.Time
}

// The oldest message is a head, because the messages of a key wait in the order in which they arrived. Counting the
// waiting messages reads one index entry for each (100,000 entries are about 700 pages), and as many rows as vacuum has
// not processed yet.
const groupStatusSQL = `
SELECT name, pause.actor, pause.reason, pause.paused_at, coalesce(alive.applied, '{}'), alive.lag,
    heads.keyless + keyed.messages, heads.keys, coalesce(heads.oldest, 0)
FROM unnest($1::text[]) WITH ORDINALITY AS wanted (name, position)
LEFT JOIN inbox_pause AS pause ON pause.consumer = name
LEFT JOIN LATERAL (
    SELECT jsonb_object_agg(owner, applied) AS applied, max(lag) AS lag
    FROM inbox_consumer WHERE consumer = name AND clock_holds(expires_at, lease)) AS alive ON true
CROSS JOIN LATERAL (
    SELECT count(*) FILTER (WHERE key = '') AS keyless, count(*) FILTER (WHERE key <> '') AS keys,
        extract(epoch FROM clock_age(min(created_at)))::float8 AS oldest
    FROM inbox_retry WHERE consumer = name AND due_at IS NOT NULL) AS heads
CROSS JOIN LATERAL (SELECT count(*) AS messages FROM inbox_retry WHERE consumer = name AND key <> '') AS keyed
ORDER BY position`

// GroupStatuses returns the status of consumer groups, in the given order.
func GroupStatuses(ctx context.Context, db *pgxpool.Pool, groups []string) ([]GroupStatus, error) {
	rows, err := db.Query(ctx, groupStatusSQL, groups)
	if err != nil {
		return nil, fmt.Errorf("read consumer groups: %w", err)
	}
	found, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (s GroupStatus, err error) {
		var actor, reason *string
		var at *time.Time
		err = row.Scan(&s.Consumer, &actor, &reason, &at, &s.Applied, &s.Lag, &s.Retrying, &s.Blocked, &s.Oldest)
		if at != nil {
			s.Paused = &PausedBy{*actor, *reason, *at}
		}
		return s, err
	})
	if err != nil {
		return nil, fmt.Errorf("read consumer groups: %w", postgres.Classify(err))
	}
	return found, nil
}
