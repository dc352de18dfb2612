package postgres

import (
	"context"
	"fmt"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

// Holder is something that keeps vacuum from removing what is dead: a session with an old snapshot or transaction, a prepared transaction, a
// replication slot.
type Holder struct {
	// Kind is session, prepared or slot.
	Kind string
	// Name is the application's name and process, the prepared transaction's or the slot's.
	Name string
	// Seconds is for how long; 0 for a slot, of which Postgres does not know.
	Seconds float64
	// Transactions is how many transactions ago its oldest began.
	Transactions int64
}

// Without the rights of pg_monitor, the sessions of other users are seen as such, but not how old they are.
const holdersSQL = `
SELECT 'session', coalesce(nullif(application_name, ''), backend_type, 'unknown') || '/' || pid, extract(epoch FROM clock_timestamp() - xact_start)::float8,
    age(coalesce(backend_xmin, backend_xid))::bigint
FROM pg_stat_activity WHERE coalesce(backend_xmin, backend_xid) IS NOT NULL AND pid <> pg_backend_pid() AND xact_start IS NOT NULL
UNION ALL
SELECT 'prepared', gid, extract(epoch FROM clock_timestamp() - prepared)::float8, age(transaction)::bigint FROM pg_prepared_xacts
UNION ALL
SELECT 'slot', slot_name, 0, greatest(age(xmin), age(catalog_xmin))::bigint FROM pg_replication_slots WHERE coalesce(xmin, catalog_xmin) IS NOT NULL
ORDER BY 4 DESC LIMIT 10`

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
