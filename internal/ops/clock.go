package ops

import (
	"context"
	"fmt"
	"time"

	"example.com/shop/internal/outbox"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

// maxSkew is how far this machine's clock may differ from the database's before CheckClock returns an error. It is half
// of what is accepted in an ID, so that a process is no longer ready before its messages are refused.
const maxSkew = 5 * time.Minute

// CheckClock returns outbox.ErrClock if this machine's clock differs from the database's by more than maxSkew. It
// returns nil if the database does not answer.
func CheckClock(ctx context.Context, db *pgxpool.Pool) error {
	ahead, err := skew(ctx, db)
	if err == nil && ahead.Abs() > maxSkew {
		return fmt.Errorf("%w: Postgres' clock is ahead by %s", outbox.ErrClock, ahead)
	}
	return nil
}

// skew returns how far the database's clock is ahead of this machine's, or a negative value if it is behind. It is
// exact to half a round trip.
func skew(ctx context.Context, db *pgxpool.Pool) (ahead time.Duration, err error) {
	var there time.Time
	before := time.Now()
	if err := db.QueryRow(ctx, `SELECT clock_timestamp()`).Scan(&there); err != nil {
		return 0, fmt.Errorf("read the database's clock: %w", err)
	}
	return there.Sub(before.Add(time.Since(before) / 2)).Round(time.Millisecond), nil
}

const aheadSQL = `
SELECT format('%s is %s ahead', what, date_trunc('second', written_at - clock_timestamp()))
FROM (
    SELECT 'the last move of shard ' || shard, moved_at FROM outbox_cursor
    UNION ALL SELECT 'the lease of shard ' || shard, lease_expires_at - lease FROM outbox_cursor
    UNION ALL SELECT 'the heartbeat of relay ' || owner, expires_at - lease FROM outbox_relay
    UNION ALL SELECT 'the count of shard ' || shard, measured_at FROM outbox_backlog
    UNION ALL SELECT 'the oldest message of shard ' || shard, oldest_at FROM outbox_backlog
    UNION ALL SELECT 'the newest message of shard ' || shard, (
        SELECT created_at FROM outbox WHERE outbox.shard = outbox_cursor.shard ORDER BY id DESC LIMIT 1
    ) FROM outbox_cursor
) AS stored (what, written_at)
WHERE written_at > clock_timestamp() + $1
ORDER BY written_at DESC`

// outboxAhead describes the times in the outbox that are in the future by more than the tolerance, because the
// database's clock was set back after they were written.
func outboxAhead(ctx context.Context, db *pgxpool.Pool, tolerance time.Duration) ([]string, error) {
	rows, err := db.Query(ctx, aheadSQL, tolerance)
	if err != nil {
		return nil, fmt.Errorf("read times of the outbox: %w", err)
	}
	return pgx.CollectRows(rows, pgx.RowTo[string])
}
