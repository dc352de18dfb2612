package ops

import (
	"context"
	"fmt"

	"example.com/shop/internal/postgres"
	"github.com/jackc/pgx/v5/pgxpool"
)

// Sessions returns how many connections to the database each application has, by its name. That shows which processes
// are running. Any role may see that much of other sessions.
func Sessions(ctx context.Context, db *pgxpool.Pool) (map[string]int, error) {
	var found map[string]int
	err := db.QueryRow(ctx, `
		SELECT coalesce(jsonb_object_agg(application_name, n), '{}') FROM (
			SELECT application_name, count(*) AS n FROM pg_stat_activity
			WHERE datname = current_database() AND application_name IS NOT NULL
			GROUP BY application_name) AS session`).Scan(&found)
	if err != nil {
		return nil, fmt.Errorf("read sessions: %w", postgres.Classify(err))
	}
	return found, nil
}
