package outbox

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"example.com/shop/internal/deadletter"
	"example.com/shop/internal/postgres"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgtype"
	"github.com/jackc/pgx/v5/pgxpool"
)

var (
	// errNotLeased means that another relay holds the shard, or that the shard must not be read yet or is drained.
	errNotLeased = errors.New("shard is leased to another relay")
	// errDrained means that the shard is retired and everything in it is delivered.
	errDrained = errors.New("shard is drained")
	// errFenced means that the cursor's row is not as this relay left it.
	errFenced = errors.New("lease lost: another relay has taken the shard over, or the database has failed over")
	// ErrForeignCluster means that the database was dumped and restored into another cluster, whose transaction IDs are
	// not those of the cursor.
	ErrForeignCluster = errors.New("the outbox cursor belongs to another Postgres cluster " +
		"(was this database restored from a dump?): its snapshots mean nothing here, " +
		"and relaying by them would skip messages; run the command `outbox repair` once")
)

// cursor is a shard's row in outbox_cursor while this relay holds the lease. Taking the lease raises the epoch, and
// every statement here requires the relay's own epoch: a relay that was frozen past its lease and wakes up can move
// nothing.
//
// The relay keeps its position in memory, and after a failover the connection pool silently reaches another server.
// The row there may be older than the position, and transactions that the position calls delivered may never have
// existed there. So a move also requires that the row has had exactly the moves that this relay knows about, and that
// the server is on the timeline on which the lease was taken. Each promotion starts another timeline.
type cursor struct {
	db       *pgxpool.Pool
	shard    int16
	epoch    int64
	stolen   bool // the previous holder had not released the lease
	moves    int64
	timeline string
	// retired is true once no transaction can write to the shard any more.
	retired atomic.Bool
	row     cursorRow
}

// cursorRow is the newest version of a cursor's row.
//
// Every move leaves a dead version behind, which vacuum cannot remove while a transaction holds an old snapshot.
// Finding the row by its key would read all dead versions; finding it by tid reads none. The tid is a hint: if the row
// is not there, find looks it up by key.
type cursorRow struct {
	tid     pgtype.TID
	retired bool
}

const acquireSQL = `
UPDATE outbox_cursor
SET owner = $2, epoch = epoch + 1, lease_expires_at = clock_timestamp() + $3, lease = $3
FROM (SELECT owner AS previous FROM outbox_cursor WHERE shard = $1 FOR UPDATE) AS old
WHERE shard = $1 AND (NOT clock_holds(lease_expires_at, lease) OR owner = $2) AND ` + readableSQL + `
  AND ` + nativeSQL + `
RETURNING epoch, previous NOT IN ('', $2), moves, retired, ` + timelineSQL + `,
    ctid, delivered::text, coalesce(batch::text, ''), last_id`

// readableSQL is true for a shard that may be read: every shard of earlier generations is drained, and the shard itself
// is not.
const readableSQL = `NOT drained AND NOT EXISTS (
    SELECT FROM outbox_cursor AS older WHERE older.generation < outbox_cursor.generation AND NOT older.drained)`

// nativeSQL is true if the cursor belongs to this cluster: its snapshots consist of this cluster's transaction ids.
const nativeSQL = `system_identifier = (SELECT system_identifier FROM pg_control_system())`

// timelineSQL is the server's timeline: the first third of a WAL segment's name.
const timelineSQL = `substr(pg_walfile_name(pg_current_wal_insert_lsn()), 1, 8)`

// acquire takes the lease of a shard if it is free, and returns the position that its last holder recorded.
func acquire(
	ctx context.Context, db *pgxpool.Pool, shard int16, owner string, lease time.Duration,
) (*cursor, position, error) {
	c, at := &cursor{db: db, shard: shard}, position{}
	var retired bool
	err := postgres.Transact(ctx, db, func(tx pgx.Tx) error {
		return tx.QueryRow(ctx, acquireSQL, shard, owner, lease).Scan(&c.epoch, &c.stolen, &c.moves, &retired, &c.timeline,
			&c.row.tid, &at.base, &at.batch, &at.lastID)
	})
	if errors.Is(err, pgx.ErrNoRows) {
		err = errNotLeased
	}
	c.retired.Store(retired)
	return c, at, err
}

// progress is what one move of the cursor records.
type progress struct {
	delivered position
	topID     int64  // the largest id delivered since the last move
	claimed   string // the snapshot of the page that is published next, "" for none
	published int
	unheard   int // those of the published messages that no queue took
	parked    []deadletter.Letter
}

// moveSQL finds the row's version in one step by its ctid $2. If $2 is NULL, it looks the row up by key.
const moveSQL = `
UPDATE outbox_cursor
SET delivered = $4, batch = nullif($5, '')::pg_snapshot, last_id = $6,
    claimed = coalesce(nullif($7, '')::pg_snapshot, claimed), published = published + $8, parked = parked + $9,
    top_id = greatest(top_id, $12), moves = moves + 1, moved_at = clock_timestamp()
WHERE ctid = coalesce($2, (SELECT ctid FROM outbox_cursor WHERE shard = $1 AND epoch = $3))
  AND shard = $1 AND epoch = $3 AND moves = $10 AND ` + timelineSQL + ` = $11
RETURNING ctid, retired, set_config('synchronous_commit',
    CASE WHEN $7 = '' THEN 'off' ELSE current_setting('synchronous_commit') END, true)`

// move records progress and commits. It is also the claim: a page that was read before the commit may be published
// after it. If p claims nothing, no message is published because of this commit, and the commit does not wait for the
// disk. If a crash of Postgres loses it, the deliveries that it recorded are repeated. move returns errFenced if the
// row is not as this relay left it.
func (c *cursor) move(ctx context.Context, p progress) error {
	var row cursorRow
	var err error
	if len(p.parked) == 0 {
		err = c.find(p, func(args []any) error {
			return postgres.TransactRow(ctx, c.db, moveSQL, args, &row.tid, &row.retired, nil)
		})
	} else {
		err = postgres.Transact(ctx, c.db, func(tx pgx.Tx) error {
			if err := deadletter.Insert(ctx, tx, p.parked...); err != nil {
				return err
			}
			return c.find(p, func(args []any) error {
				return tx.QueryRow(ctx, moveSQL, args...).Scan(&row.tid, &row.retired, nil)
			})
		})
	}
	if err != nil {
		return fmt.Errorf("move cursor: %w", err)
	}
	c.moved(row)
	return nil
}

// moved stores the row that a move has written.
func (c *cursor) moved(row cursorRow) {
	c.row, c.moves = row, c.moves+1
	c.retired.Store(row.retired)
}

// find runs moveSQL on the row where it was last seen. If the row is not there, find looks it up by key.
func (c *cursor) find(p progress, query func(args []any) error) error {
	for _, hint := range []pgtype.TID{c.row.tid, {}} {
		err := query([]any{c.shard, hint, c.epoch, p.delivered.base, p.delivered.batch, p.delivered.lastID,
			p.claimed, p.published, len(p.parked), c.moves, c.timeline, p.topID})
		if !errors.Is(err, pgx.ErrNoRows) {
			return err
		}
	}
	return errFenced
}

const renewSQL = `
UPDATE outbox_cursor SET lease_expires_at = clock_timestamp() + $3, lease = $3
WHERE shard = $1 AND epoch = $2 AND ` + timelineSQL + ` = $4
RETURNING retired`

// renew extends the lease. It returns errFenced if this relay has lost it.
func (c *cursor) renew(ctx context.Context, lease time.Duration) error {
	var retired bool
	err := c.db.QueryRow(ctx, renewSQL, c.shard, c.epoch, lease, c.timeline).Scan(&retired)
	if errors.Is(err, pgx.ErrNoRows) {
		return errFenced
	}
	if err != nil {
		return fmt.Errorf("renew lease: %w", postgres.Classify(err))
	}
	c.retired.Store(retired)
	return nil
}

// releaseSQL also notifies relays that wait for a shard, so that they need not wait for their next poll.
const releaseSQL = `
WITH released AS (
    UPDATE outbox_cursor SET owner = '', lease_expires_at = '-infinity', drained = drained OR $3
    WHERE shard = $1 AND epoch = $2 AND (NOT $3 OR retired AND moves = $4 AND ` + timelineSQL + ` = $5)
    RETURNING shard)
SELECT pg_notify('` + Channel + `', '` + leaseNews + `') FROM released`

// release ends the lease, so that another relay need not wait for it to expire.
func (c *cursor) release(ctx context.Context) error {
	_, err := c.db.Exec(ctx, releaseSQL, c.shard, c.epoch, false, c.moves, c.timeline)
	return err
}

// drain marks a retired shard as read to its end and releases the lease. The caller must have known that the shard is
// retired before it looked for messages for the last time, and it must have recorded everything that it found.
func (c *cursor) drain(ctx context.Context) error {
	tag, err := c.db.Exec(ctx, releaseSQL, c.shard, c.epoch, true, c.moves, c.timeline)
	switch {
	case err != nil:
		return fmt.Errorf("drain shard: %w", postgres.Classify(err))
	case tag.RowsAffected() == 0:
		return errFenced
	}
	return errDrained
}
