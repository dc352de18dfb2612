package outbox

import (
	"context"
	"errors"
	"fmt"
	"time"

	"example.com/shop/internal/postgres"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

// ErrClock means that a message was not inserted because of the time in its ID: by the database's clock it lies more
// than ten minutes ahead, or six days back. As a rule the message is right and the clock of this machine is not, and a
// process on another machine can write it. Nothing was written.
var ErrClock = errors.New("this machine's clock and Postgres' differ")

// MaxAge is how old the ID of a message may be when it is inserted; outbox_oldest is the same in SQL. Consumers take a
// message for almost a day longer, as much as it may be under way.
const MaxAge = 6 * 24 * time.Hour

// clockConstraint is the name under which Postgres refuses such a message.
const clockConstraint = "outbox_message_id_is_timely"

// blameClock makes ErrClock of what Postgres refused for the time in an ID.
func blameClock(err error) error {
	if postgres.Violates(err, clockConstraint) {
		return fmt.Errorf("%w: %w", ErrClock, err)
	}
	return err
}

// MaxSkew is how far this machine's clock may be ahead of the database's, or behind it, before CheckClock complains:
// half of what is accepted of an ID, so that a process says it is not ready before its messages are refused.
const MaxSkew = 5 * time.Minute

// CheckClock returns ErrClock if this machine's clock differs from the database's by more than MaxSkew. It returns nil
// if the database does not answer.
func CheckClock(ctx context.Context, db *pgxpool.Pool) error {
	skew, err := Skew(ctx, db)
	if err == nil && skew.Abs() > MaxSkew {
		return fmt.Errorf("%w: Postgres' is ahead by %s", ErrClock, skew)
	}
	return nil
}

// Skew returns by how much the database's clock is ahead of this machine's; negative if it is behind. It is exact to
// half a round trip.
func Skew(ctx context.Context, db *pgxpool.Pool) (ahead time.Duration, err error) {
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
    UNION ALL SELECT 'the sign of life of relay ' || owner, expires_at - lease FROM outbox_relay
    UNION ALL SELECT 'the count of shard ' || shard, measured_at FROM outbox_backlog
    UNION ALL SELECT 'the oldest message of shard ' || shard, oldest_at FROM outbox_backlog
    UNION ALL SELECT 'the newest message of shard ' || shard, (
        SELECT created_at FROM outbox WHERE outbox.shard = outbox_cursor.shard ORDER BY id DESC LIMIT 1) FROM outbox_cursor
) AS stored (what, written_at)
WHERE written_at > clock_timestamp() + $1
ORDER BY written_at DESC`

// Ahead names the times in the outbox that are by more than the tolerance in the future: the database's clock was set
// back since.
func Ahead(ctx context.Context, db *pgxpool.Pool, tolerance time.Duration) ([]string, error) {
	rows, err := db.Query(ctx, aheadSQL, tolerance)
	if err != nil {
		return nil, fmt.Errorf("read times of the outbox: %w", err)
	}
	return pgx.CollectRows(rows, pgx.RowTo[string])
}
