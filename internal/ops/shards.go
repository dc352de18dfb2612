package ops

import (
	"context"
	"errors"
	"fmt"
	"time"

	"example.com/shop/internal/outbox"
	"example.com/shop/internal/postgres"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

// MaxShards is the largest number of shards.
const MaxShards = 64

// ErrBusy means that a transaction kept the outbox in use for too long to change the shards.
var ErrBusy = errors.New("outbox is in use")

// SetShards spreads new messages over n shards, 1 to MaxShards. It loses no message and keeps the order of each key. It
// needs a moment in which no transaction that has inserted messages is open. It tries for a second at a time, during
// which other writers wait, and retries until ctx is done. Then it returns ErrBusy.
func SetShards(ctx context.Context, db *pgxpool.Pool, n int) error {
	if n < 1 || n > MaxShards {
		return fmt.Errorf("the outbox can have 1 to %d shards, not %d", MaxShards, n)
	}
	var busy error
	for {
		err := trySetShards(ctx, db, n)
		switch {
		case postgres.IsLocked(err):
			busy = fmt.Errorf("%w: a transaction that has inserted messages stays open: %w", ErrBusy, err)
			select {
			case <-ctx.Done():
			case <-time.After(2 * time.Second):
			}
		case err == nil, busy == nil, ctx.Err() == nil, errors.Is(err, postgres.ErrOutcomeUnknown):
			return err
		}
		if ctx.Err() != nil {
			return busy
		}
	}
}

func trySetShards(ctx context.Context, db *pgxpool.Pool, n int) error {
	return postgres.Transact(ctx, db, func(tx pgx.Tx) error {
		if _, err := tx.Exec(ctx, `SET LOCAL lock_timeout = '1s'`); err != nil {
			return err
		}
		_, err := tx.Exec(ctx, `SELECT outbox_set_shards($1)`, n)
		return err
	})
}

// EnsureShards calls SetShards unless the outbox already has n shards. It reports whether it changed anything.
func EnsureShards(ctx context.Context, db *pgxpool.Pool, n int) (changed bool, err error) {
	var now int
	if err := db.QueryRow(ctx, `SELECT count(*) FROM outbox_cursor WHERE NOT retired`).Scan(&now); err != nil {
		return false, fmt.Errorf("read shards: %w", err)
	}
	if now == n {
		return false, nil
	}
	return true, SetShards(ctx, db, n)
}

// Repair makes the outbox usable after the database was moved into another cluster, by a dump or by a copy of its rows.
// It returns the number of messages to publish, some of them possibly again, and skips no undelivered message. It also
// moves sequences of all tables past their rows. It returns ErrNoRepairNeeded if nothing is wrong. If it cannot
// determine what was delivered, its error says what to do.
func Repair(ctx context.Context, db *pgxpool.Pool) (undelivered int, err error) {
	var found *int
	err = postgres.Transact(ctx, db, func(tx pgx.Tx) error {
		return tx.QueryRow(ctx, `SELECT outbox_repair()`).Scan(&found)
	})
	switch {
	case err != nil:
		return 0, fmt.Errorf("repair outbox: %w", err)
	case found == nil:
		return 0, ErrNoRepairNeeded
	}
	return *found, nil
}

// ErrNoRepairNeeded means that the cursor belongs to this cluster and that no sequence is behind its table.
var ErrNoRepairNeeded = errors.New("the outbox cursor belongs to this cluster and no sequence is behind: " +
	"there is nothing to repair")

// Shard is the state of one shard of the outbox.
type Shard struct {
	Shard      int16 `json:"shard"`
	Generation int   `json:"generation"`
	// Retired shards get no new messages. Drained shards are retired, and everything in them is delivered.
	Retired bool `json:"retired"`
	Drained bool `json:"drained"`
	// Owner is the relay that holds the lease, "" if none does.
	Owner string `json:"owner"`
	Epoch int64  `json:"epoch"`
	// Backlog is the number of undelivered messages and Lag the age of the oldest in seconds, as of MeasuredAt.
	Backlog    int64      `json:"backlog"`
	Lag        float64    `json:"lag_seconds"`
	MeasuredAt *time.Time `json:"measured_at"`
	Published  int64      `json:"published"`
	Parked     int64      `json:"parked"`
	MovedAt    time.Time  `json:"moved_at"`
}

const statusSQL = `
SELECT shard, generation, retired, drained, CASE WHEN clock_holds(lease_expires_at, lease) THEN owner ELSE '' END,
    epoch, coalesce(messages, 0), greatest(coalesce(extract(epoch FROM measured_at - oldest_at)::float8, 0), 0),
    measured_at, published, parked, moved_at
FROM outbox_cursor LEFT JOIN outbox_backlog USING (shard)
ORDER BY shard`

// Shards returns the state of every shard.
func Shards(ctx context.Context, db *pgxpool.Pool) ([]Shard, error) {
	if _, err := outbox.Measure(ctx, db, 2*time.Second); err != nil {
		return nil, err
	}
	rows, err := db.Query(ctx, statusSQL)
	if err != nil {
		return nil, fmt.Errorf("read shards: %w", err)
	}
	shards, err := pgx.CollectRows(rows, pgx.RowToStructByPos[Shard])
	if err != nil {
		return nil, fmt.Errorf("read shards: %w", err)
	}
	return shards, nil
}

// RunningRelay is a relay that has renewed its registration.
type RunningRelay struct {
	Owner string
	// Problem is why the relay cannot publish, "" if it can.
	Problem string
}

// Relays returns the running relays.
func Relays(ctx context.Context, db *pgxpool.Pool) ([]RunningRelay, error) {
	rows, err := db.Query(ctx,
		`SELECT owner, problem FROM outbox_relay WHERE clock_holds(expires_at, lease) ORDER BY owner`)
	if err != nil {
		return nil, fmt.Errorf("read relays: %w", err)
	}
	return pgx.CollectRows(rows, pgx.RowToStructByPos[RunningRelay])
}

// isNativeSQL compares clusters because a cursor contains snapshots, which are valid only in their own cluster.
const isNativeSQL = `
SELECT bool_and(system_identifier = (SELECT system_identifier FROM pg_control_system())) FROM outbox_cursor`

// isNative reports whether the cursor belongs to this cluster. If not, no relay runs before Repair.
func isNative(ctx context.Context, db *pgxpool.Pool) (native bool, err error) {
	if err = db.QueryRow(ctx, isNativeSQL).Scan(&native); err != nil {
		return false, fmt.Errorf("read cursor: %w", err)
	}
	return native, nil
}

// longestRetention returns how long a delivered message can stay in the outbox: until its slot is about to be reused.
func longestRetention(ctx context.Context, db *pgxpool.Pool) (longest time.Duration, err error) {
	if err = db.QueryRow(ctx, `SELECT outbox_slots() * outbox_slot_length()`).Scan(&longest); err != nil {
		return 0, fmt.Errorf("read length of slots: %w", err)
	}
	return longest, nil
}
