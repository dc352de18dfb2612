package postgres

import (
	"context"
	"fmt"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

// Holder is something that keeps vacuum from removing what is dead: a session with an old snapshot or transaction, a prepared transaction, a
// replication slot, a standby that tells of its queries.
type Holder struct {
	// Kind is session, prepared, slot or standby.
	Kind string
	// Name is the application's name and process, the prepared transaction's or the slot's.
	Name string
	// Seconds is for how long; 0 for a slot or a standby, of which Postgres does not know.
	Seconds float64
	// Transactions is how many transactions ago its oldest began.
	Transactions int64
}

// Without the rights of pg_monitor, the sessions of other users are seen as such, but not how old they are. Those of other databases hold back
// nothing of ours.
const holdersSQL = `
SELECT 'session', coalesce(nullif(application_name, ''), backend_type, 'unknown') || '/' || pid, extract(epoch FROM clock_timestamp() - xact_start)::float8,
    age(coalesce(backend_xmin, backend_xid))::bigint
FROM pg_stat_activity WHERE coalesce(backend_xmin, backend_xid) IS NOT NULL AND pid <> pg_backend_pid() AND xact_start IS NOT NULL
    AND datname = current_database()
UNION ALL
SELECT 'prepared', gid, extract(epoch FROM clock_timestamp() - prepared)::float8, age(transaction)::bigint FROM pg_prepared_xacts
WHERE database = current_database()
UNION ALL
SELECT 'slot', slot_name, 0, greatest(age(xmin), age(catalog_xmin))::bigint FROM pg_replication_slots WHERE coalesce(xmin, catalog_xmin) IS NOT NULL
UNION ALL
SELECT 'standby', coalesce(nullif(application_name, ''), 'unknown') || '/' || pid, 0, age(backend_xmin)::bigint
FROM pg_stat_replication WHERE backend_xmin IS NOT NULL
ORDER BY 4 DESC, 3 DESC LIMIT 10`

// Holders returns those that hold vacuum back, the oldest first.
func Holders(ctx context.Context, db *pgxpool.Pool) ([]Holder, error) {
	rows, err := db.Query(ctx, holdersSQL)
	if err != nil {
		return nil, fmt.Errorf("look for old transactions: %w", Classify(err))
	}
	holders, err := pgx.CollectRows(rows, pgx.RowToStructByPos[Holder])
	if err != nil {
		return nil, fmt.Errorf("look for old transactions: %w", Classify(err))
	}
	return holders, nil
}
