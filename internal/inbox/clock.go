package inbox

import (
	"context"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

const aheadSQL = `
SELECT format('%s is %s ahead', what, date_trunc('second', written_at - clock_timestamp()))
FROM (
    SELECT format('the heartbeat of %s (%s)', owner, consumer), expires_at - lease FROM inbox_consumer
    UNION ALL SELECT 'the newest retry of ' || consumer, max(created_at) FROM inbox_retry GROUP BY consumer
) AS stored (what, written_at)
WHERE written_at > clock_timestamp() + $1
ORDER BY written_at DESC`

// Ahead describes the times in the inbox that are in the future by more than the tolerance, because the database's
// clock was set back after they were written.
func Ahead(ctx context.Context, db *pgxpool.Pool, tolerance time.Duration) ([]string, error) {
	rows, err := db.Query(ctx, aheadSQL, tolerance)
	if err != nil {
		return nil, fmt.Errorf("read times of the inbox: %w", err)
	}
	return pgx.CollectRows(rows, pgx.RowTo[string])
}
