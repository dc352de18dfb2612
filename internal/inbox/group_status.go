package inbox

import (
	"context"
	"fmt"
	"time"

	"example.com/shop/internal/postgres"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

// GroupStatus is how a consumer group stands.
type GroupStatus struct {
	Consumer string
	// Paused says who paused it and why; nil if nobody did.
	Paused *PausedBy
	// Processes is how many have it running; a paused one counts. Applied is what each has applied since it began, by its name.
	Applied map[string]int64
	// Lag is the age in seconds that the message had which was applied last, of all processes the largest; nil before the first.
	Lag *float64
	// Retrying are the messages in inbox_retry, Blocked the keys among them whose messages wait for the first, and Oldest the seconds that the
	// oldest of the messages has waited.
	Retrying, Blocked int64
	Oldest            float64
}

// PausedBy is a pause.
type PausedBy struct {
	Actor, Reason string
	At            time.Time
}

// The oldest message is a head, as those of a key wait in the order in which they came. How many wait is counted: an
// index entry for each, of which 100,000 are some 700 pages, and as many rows as vacuum has not seen yet.
const standingsSQL = `
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

// GroupStatuses returns how consumer groups stand, in the order given.
func GroupStatuses(ctx context.Context, db *pgxpool.Pool, groups []string) ([]GroupStatus, error) {
	rows, err := db.Query(ctx, standingsSQL, groups)
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
