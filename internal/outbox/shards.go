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

// MaxShards is the most shards that the log can be spread over.
const MaxShards = 64

// ErrBusy means that some transaction has held the outbox for too long to change it.
var ErrBusy = errors.New("outbox is in use")

// SetShards spreads the log over n shards from now on; nothing is lost, and no message of a key overtakes another. It waits until no
// transaction that has inserted is open; while it tries, for a second at a time, others wait with it. It tries until ctx is done, and
// then returns ErrBusy.
func SetShards(ctx context.Context, db *pgxpool.Pool, n int) error {
	if n < 1 || n > MaxShards {
		return fmt.Errorf("the outbox can have 1 to %d shards, not %d", MaxShards, n)
	}
	var busy error
	for {
		err := postgres.Transact(ctx, db, func(tx pgx.Tx) error {
			if _, err := tx.Exec(ctx, `SET LOCAL lock_timeout = '1s'`); err != nil {
				return err
			}
			_, err := tx.Exec(ctx, `SELECT outbox_set_shards($1)`, n)
			return err
		})
		switch {
		case postgres.IsLocked(err):
			busy = fmt.Errorf("%w: some transaction that has inserted stays open: %w", ErrBusy, err)
			wait(ctx, nil, 2*time.Second)
		case err == nil, busy == nil, ctx.Err() == nil, errors.Is(err, postgres.ErrOutcomeUnknown):
			return err
		}
		if ctx.Err() != nil {
			return busy
		}
	}
}

// EnsureShards is SetShards unless the log is spread over n shards already, and tells whether it was not.
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

// Repair makes the outbox usable after the database was moved into another cluster, by a dump or by a copy of its rows,
// and returns how many messages are to be published, some of them maybe again. Nothing that was not delivered is
// skipped. Sequences that stayed behind are moved forward, those of the other tables, too. It returns ErrNoRepairNeeded
// if nothing is amiss, and an error that says how to go on where it cannot tell what was delivered.
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

// ErrNoRepairNeeded means that the cursor belongs to this cluster, and that no sequence is behind.
var ErrNoRepairNeeded = errors.New("the outbox cursor belongs to this cluster and no sequence is behind, there is nothing to repair")

// Shard is what an operator wants to know of one.
type Shard struct {
	Shard      int16 `json:"shard"`
	Generation int   `json:"generation"`
	// Retired: nothing is written to it any more; Drained: and everything in it is delivered.
	Retired bool `json:"retired"`
	Drained bool `json:"drained"`
	// Owner is the relay that holds the lease, "" if none does.
	Owner string `json:"owner"`
	Epoch int64  `json:"epoch"`
	// Backlog and Lag were counted at MeasuredAt: messages not delivered, and the age of the oldest in seconds.
	Backlog    int64      `json:"backlog"`
	Lag        float64    `json:"lag_seconds"`
	MeasuredAt *time.Time `json:"measured_at"`
	Published  int64      `json:"published"`
	Parked     int64      `json:"parked"`
	MovedAt    time.Time  `json:"moved_at"`
}

const statusSQL = `
SELECT shard, generation, retired, drained, CASE WHEN clock_holds(lease_expires_at, lease) THEN owner ELSE '' END, epoch, coalesce(messages, 0),
    greatest(coalesce(extract(epoch FROM measured_at - oldest_at)::float8, 0), 0), measured_at, published, parked, moved_at
FROM outbox_cursor LEFT JOIN outbox_backlog USING (shard)
ORDER BY shard`

// Status returns every shard.
func Status(ctx context.Context, db *pgxpool.Pool) ([]Shard, error) {
	if _, err := Measure(ctx, db, 2*time.Second); err != nil {
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

// Alive is a relay that has given a sign of life.
type Alive struct {
	Owner string
	// Problem is what keeps it from publishing, "" if nothing does.
	Problem string
}

// Relays returns the relays alive.
func Relays(ctx context.Context, db *pgxpool.Pool) ([]Alive, error) {
	rows, err := db.Query(ctx, `SELECT owner, problem FROM outbox_relay WHERE clock_holds(expires_at, lease) ORDER BY owner`)
	if err != nil {
		return nil, fmt.Errorf("read relays: %w", err)
	}
	return pgx.CollectRows(rows, pgx.RowToStructByPos[Alive])
}

// IsNative tells whether the cursor belongs to this cluster; if not, no relay runs before Repair.
func IsNative(ctx context.Context, db *pgxpool.Pool) (native bool, err error) {
	if err = db.QueryRow(ctx, `SELECT bool_and(`+nativeSQL+`) FROM outbox_cursor`).Scan(&native); err != nil {
		return false, fmt.Errorf("read cursor: %w", err)
	}
	return native, nil
}

// LongestRetention returns how long a delivered message may stay in the log at most: until its slot is about to be written again.
func LongestRetention(ctx context.Context, db *pgxpool.Pool) (longest time.Duration, err error) {
	if err = db.QueryRow(ctx, `SELECT outbox_slots() * outbox_slot_length()`).Scan(&longest); err != nil {
		return 0, fmt.Errorf("read length of slots: %w", err)
	}
	return longest, nil
}
