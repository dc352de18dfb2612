package outbox

import (
	"context"
	"fmt"

	"example.com/shop/internal/messaging"
	"example.com/shop/internal/postgres"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgtype"
	"github.com/jackc/pgx/v5/pgxpool"
)

// position is a place in the log. Everything visible in base is before it. While a batch is open, so is everything
// visible in batch whose id is at most lastID. Snapshots are stored in Postgres' text form; only Postgres computes with
// them.
type position struct {
	base   string
	batch  string // "" when no batch is open
	lastID int64
}

// page is a contiguous run of the log, in order.
type page struct {
	rows     []row
	snapshot string   // the batch that the rows were read from
	claimed  bool     // by the statement that read it, see nextAndMove
	start    position // before the first row
	end      position // after the last row
}

type row struct {
	id      int64
	message messaging.Message
	headers messaging.StoredHeaders
}

// validate returns the reason that the row cannot be published, or nil. Every row is checked when it is inserted,
// except when the inserter claims to have checked it or is a superuser.
func (r *row) validate() error {
	if r.headers.Malformed != nil {
		return fmt.Errorf("%w: headers are not an object of strings: %w", messaging.ErrInvalid, r.headers.Malformed)
	}
	return r.message.Validate()
}

// before returns the position before the i-th row.
func (p *page) before(i int) position {
	switch {
	case i == 0:
		return p.start
	case i == len(p.rows):
		return p.end
	}
	return position{base: p.start.base, batch: p.snapshot, lastID: p.rows[i-1].id}
}

// eventLog reads the log of one shard, page by page.
type eventLog struct {
	db       *pgxpool.Pool
	shard    int16
	maxRows  int
	maxBytes int
	bounds   bounds // of the batch that is open
}

// claim is what a relay records with the page that it claims.
type claim struct {
	*cursor
	progress
}

// bounds are the smallest and largest id among a batch's rows from transactions that began after its base.
type bounds struct {
	batch  string
	lo, hi int64
}

// openSQL reads the rows that are new since a snapshot. A row is new if its transaction was in progress when the
// snapshot was taken or began later. Each case is its own branch, so that each is an index range. (A single condition,
// xid >= pg_snapshot_xmin, would read everything since the oldest open transaction again and again while that stays
// open.)
//
// Each branch reads one row more than a page, to see whether all rows fit. If they fit, they are sorted by id. If not,
// they are a batch that pageSQL reads page by page, and openSQL returns only the first row, to carry the snapshot. The
// branches can include the payloads: Postgres stores large ones out of line and fetches them only for the rows that it
// returns.
const openSQL = freshSQL + openedSQL + `, NULL::tid, NULL::boolean` + messagesSQL

const freshSQL = `
WITH fresh AS (
    SELECT old.*
    FROM pg_snapshot_xip($2::pg_snapshot) AS under_way (xid) CROSS JOIN LATERAL (
        SELECT ` + columns + ` FROM outbox
        WHERE shard = $1 AND outbox.xid = under_way.xid
        ORDER BY id LIMIT $3 + 1) AS old
    UNION ALL
    (SELECT ` + columns + ` FROM outbox
     WHERE shard = $1 AND xid >= pg_snapshot_xmax($2::pg_snapshot)
     ORDER BY xid LIMIT $3 + 1)
), measured AS MATERIALIZED (
    SELECT *, count(*) OVER () <= $3 AND sum(octet_length(payload)) OVER () <= $4 AS complete,
        row_number() OVER (ORDER BY id) AS position
    FROM fresh
)`

const columns = `id, message_id, type, key, payload, nullif(headers, '{}') AS headers, created_at`

const openedSQL = `
SELECT (SELECT pg_current_snapshot())::text, complete, id, message_id, type, key, payload, headers, created_at`

const messagesSQL = `
FROM measured
WHERE complete OR position = 1
ORDER BY id`

// claimSQL is openSQL that also claims the page that it returns if all rows fit into one page. It does the work of
// moveSQL in the same round trip and claims the statement's own snapshot. If the cursor's row is not where it was last
// seen, or not as this relay left it, claimSQL claims nothing, and moveSQL finds out why.
const claimSQL = freshSQL + `, moved AS (
    UPDATE outbox_cursor
    SET delivered = $6, batch = nullif($7, '')::pg_snapshot, last_id = $8, claimed = pg_current_snapshot(),
        published = published + $9, top_id = greatest(top_id, $10), moves = moves + 1, moved_at = clock_timestamp()
    WHERE ctid = $5 AND shard = $1 AND epoch = $11 AND moves = $12 AND ` + timelineSQL + ` = $13
      AND (SELECT bool_or(complete) FROM measured)
    RETURNING ctid, retired
)` + openedSQL + `, (SELECT ctid FROM moved), (SELECT retired FROM moved)` + messagesSQL

// boundsSQL returns the bounds of a batch that does not fit into a page. It reads the batch once in the index, however
// large the batch is. The count keeps the planner from answering min() and max() with a walk of the primary key through
// everything delivered long ago.
const boundsSQL = `
SELECT coalesce(min(id), 0), coalesce(max(id), 0), count(*)
FROM outbox
WHERE shard = $1 AND xid >= pg_snapshot_xmax($2::pg_snapshot) AND xid < pg_snapshot_xmax($3::pg_snapshot)
  AND pg_visible_in_snapshot(xid, $3::pg_snapshot)`

// pageSQL returns one page of an open batch: rows that are visible in the batch ($3), are not visible in the base ($2),
// and come after the last id. It reads the next rows of each transaction that was in progress at the base. For later
// transactions, it reads the next rows by id within the bounds, where nearly every row belongs to the batch. The limit
// on bytes keeps at least one row.
const pageSQL = `
WITH candidates AS (
    SELECT old.*
    FROM pg_snapshot_xip($2::pg_snapshot) AS under_way (xid) CROSS JOIN LATERAL (
        SELECT ` + columns + ` FROM outbox
        WHERE shard = $1 AND outbox.xid = under_way.xid AND id > $4
        ORDER BY id LIMIT $5) AS old
    WHERE pg_visible_in_snapshot(under_way.xid, $3::pg_snapshot)
    UNION ALL
    (SELECT ` + columns + ` FROM outbox
     WHERE shard = $1 AND id > $4 AND id BETWEEN $7 AND $8
       AND xid >= pg_snapshot_xmax($2::pg_snapshot) AND pg_visible_in_snapshot(xid, $3::pg_snapshot)
     ORDER BY id LIMIT $5)
), measured AS (
    SELECT *, sum(octet_length(payload)) OVER (ORDER BY id ROWS UNBOUNDED PRECEDING) AS running,
        row_number() OVER (ORDER BY id) AS position
    FROM candidates
    ORDER BY id LIMIT $5
)
SELECT '', true, id, message_id, type, key, payload, headers, created_at, NULL::tid, NULL::boolean
FROM measured
WHERE running <= $6 OR position = 1
ORDER BY id`

// next returns the page after at. If there is no page yet, it returns nil and the position to continue from.
func (l *eventLog) next(ctx context.Context, at position) (*page, position, error) {
	found, at, _, err := l.read(ctx, at, openSQL, l.shard, at.base, l.maxRows, l.maxBytes)
	return found, at, err
}

// nextAndMove is next and cursor.move in one round trip. If the rest of the log fits into one page, it records c,
// claims the page and returns the cursor's new row. Otherwise it records nothing and returns a nil row.
func (l *eventLog) nextAndMove(ctx context.Context, at position, c claim) (*page, position, *cursorRow, error) {
	found, at, moved, err := l.read(ctx, at, claimSQL, l.shard, at.base, l.maxRows, l.maxBytes, c.row.tid,
		c.delivered.base, c.delivered.batch, c.delivered.lastID, c.published, c.topID, c.epoch, c.moves, c.timeline)
	if found != nil {
		found.claimed = moved != nil
	}
	return found, at, moved, err
}

// read returns the next page of the open batch. If there is none, it opens a batch with sql and returns its first page.
func (l *eventLog) read(
	ctx context.Context, at position, sql string, args ...any,
) (found *page, next position, moved *cursorRow, err error) {
	if at.batch != "" {
		found, err := l.nextOfBatch(ctx, at)
		if found != nil || err != nil {
			return found, at, nil, err
		}
		at = position{base: at.batch} // the batch has been read to its end
		args[1] = at.base
	}
	opened, err := l.query(ctx, sql, args...)
	switch {
	case err != nil || len(opened.rows) == 0:
		return nil, at, nil, err
	case opened.complete:
		found := &page{rows: opened.rows, snapshot: opened.snapshot, start: at, end: position{base: opened.snapshot}}
		return found, at, opened.moved(), nil
	}
	found, err = l.nextOfBatch(ctx, position{base: at.base, batch: opened.snapshot})
	return found, at, nil, err
}

func (l *eventLog) nextOfBatch(ctx context.Context, at position) (*page, error) {
	if l.bounds.batch != at.batch {
		found := bounds{batch: at.batch}
		err := l.db.QueryRow(ctx, boundsSQL, l.shard, at.base, at.batch).Scan(&found.lo, &found.hi, nil)
		if err != nil {
			return nil, fmt.Errorf("find bounds of batch: %w", postgres.Classify(err))
		}
		l.bounds = found
	}
	found, err := l.query(ctx, pageSQL,
		l.shard, at.base, at.batch, at.lastID, l.maxRows, l.maxBytes, l.bounds.lo, l.bounds.hi)
	if err != nil || len(found.rows) == 0 {
		return nil, err
	}
	end := position{base: at.base, batch: at.batch, lastID: found.rows[len(found.rows)-1].id}
	return &page{rows: found.rows, snapshot: at.batch, start: at, end: end}, nil
}

// opened is the result of a query. If complete is true, it contains all rows there are.
type opened struct {
	rows     []row
	snapshot string
	complete bool
	cursor   pgtype.TID // the cursor's new row, if the statement has moved it
	retired  pgtype.Bool
}

// moved returns the cursor's new row, or nil if the statement has not moved it.
func (o *opened) moved() *cursorRow {
	if !o.cursor.Valid {
		return nil
	}
	return &cursorRow{o.cursor, o.retired.Bool}
}

func (l *eventLog) query(ctx context.Context, sql string, args ...any) (found opened, err error) {
	err = postgres.TransactRows(ctx, l.db, sql, args, func(rows pgx.Rows) error {
		found.rows, err = pgx.CollectRows(rows, func(r pgx.CollectableRow) (row, error) {
			var scanned row
			m := &scanned.message
			err := r.Scan(&found.snapshot, &found.complete, &scanned.id, (*[16]byte)(&m.ID), &m.Type, &m.Key, &m.Payload,
				&scanned.headers, &m.CreatedAt, &found.cursor, &found.retired)
			m.Headers = scanned.headers.Map
			return scanned, err
		})
		return err
	})
	if err != nil {
		return opened{}, fmt.Errorf("read outbox: %w", err)
	}
	return found, nil
}
