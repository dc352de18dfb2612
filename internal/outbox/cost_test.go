package outbox

import (
	"encoding/json"
	"fmt"
	"testing"
	"time"

	"example.com/shop/internal/dev/testenv"
	"example.com/shop/internal/postgres"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

// TestCostStaysFlat lets 200,000 messages flow while somebody holds back what vacuum may remove, and compares what
// Postgres reads for the last thousand with what it read for the first. A queue of row states, or a cursor row that is
// searched by its key, fails this.
func TestCostStaysFlat(t *testing.T) {
	t.Parallel()
	for name, hold := range map[string]string{
		"WithASnapshotHeld":         `SELECT 1`,
		"WithAWriteTransactionOpen": `SELECT outbox_insert('probe.Late', '', '')`,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			db := testenv.Postgres(t)
			holder, err := db.BeginTx(t.Context(), pgx.TxOptions{IsoLevel: pgx.RepeatableRead})
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = holder.Rollback(t.Context()) })
			if _, err := holder.Exec(t.Context(), hold); err != nil {
				t.Fatal(err)
			}
			held, at, err := acquire(t.Context(), db, 0, "cost", time.Hour)
			if err != nil {
				t.Fatal(err)
			}
			log := &eventLog{db: db, maxRows: 500, maxBytes: 4 << 20}
			look := func() { // where the explained statement has moved the row, as the relay's own does
				t.Helper()
				if err := db.QueryRow(t.Context(), `SELECT ctid, moves FROM outbox_cursor`).Scan(&held.row.tid,
					&held.moves); err != nil {
					t.Fatal(err)
				}
			}
			// Each transaction under way, in whatever database of the cluster, costs the claim a look into each of the five
			// slots' indexes: some 10 buffers a page. Other tests have such.
			const perTransaction = 12
			flow := func(messages, page int) (buffers, underWay int) {
				t.Helper()
				for range messages / page {
					fill(t, db, page, 100)
					var open int
					if err := db.QueryRow(t.Context(), `SELECT count(*) FROM pg_snapshot_xip($1::pg_snapshot)`,
						at.base).Scan(&open); err != nil {
						t.Fatal(err)
					}
					underWay += open
					before := held.moves
					buffers += explain(t, db, claimSQL, int16(0), at.base, 500, 4<<20, held.row.tid, at.base, at.batch,
						at.lastID, 0, 0, held.epoch, held.moves, held.timeline)
					look()
					found, _, err := log.next(t.Context(), at)
					if err != nil || len(found.rows) != page {
						t.Fatalf("%v, %v", found, err)
					}
					at = found.end
					buffers += explain(t, db, moveSQL, int16(0), held.row.tid, held.epoch, at.base, at.batch, at.lastID,
						found.snapshot, 0, 0, held.moves, held.timeline, 0)
					if look(); held.moves != before+2 {
						t.Fatalf("%d moves, want two", held.moves-before)
					}
				}
				return buffers, underWay
			}
			flow(10_000, 500) // so that the indexes have grown to where they need no further level for long
			early, underWayEarly := flow(1000, 100)
			flow(188_000, 500)
			late, underWayLate := flow(1000, 100)
			others := perTransaction * max(0, underWayLate-underWayEarly)
			t.Logf("buffers read for 1,000 messages behind 10,000: %d, behind 200,000: %d", early, late)
			if float64(late-others) > 1.5*float64(early) {
				t.Errorf("1,000 messages cost %d buffers early and %d late, %d of them for others' transactions", early,
					late, others)
			}
		})
	}
}

// TestMovingTheCursorStaysFlat: a busy relay moves its cursor hundreds of times a second, and a snapshot that is held
// keeps every old version of the row. Finding the row by its key would visit them all.
func TestMovingTheCursorStaysFlat(t *testing.T) {
	t.Parallel()
	db := testenv.Postgres(t)
	holder, err := db.BeginTx(t.Context(), pgx.TxOptions{IsoLevel: pgx.RepeatableRead})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = holder.Rollback(t.Context()) })
	if _, err := holder.Exec(t.Context(), `SELECT 1`); err != nil {
		t.Fatal(err)
	}
	config := db.Config().Copy()
	config.MaxConns = 1 // a session can make only its own counters current
	relay, err := pgxpool.NewWithConfig(t.Context(), config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(relay.Close)
	held, at, err := acquire(t.Context(), relay, 0, "cost", time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	reads := func() (n int) {
		t.Helper()
		if _, err := relay.Exec(t.Context(), `SELECT pg_stat_force_next_flush()`); err != nil {
			t.Fatal(err)
		}
		err := relay.QueryRow(t.Context(), `
			SELECT heap_blks_hit + heap_blks_read + idx_blks_hit + idx_blks_read FROM pg_statio_user_tables
			WHERE relname = 'outbox_cursor'`).Scan(&n)
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	moveTimes := func(n int) (perMove float64) {
		t.Helper()
		before := reads()
		for range n {
			if err := held.move(t.Context(), progress{delivered: at}); err != nil {
				t.Fatal(err)
			}
		}
		return float64(reads()-before) / float64(n)
	}
	first := moveTimes(200)
	moveTimes(2000)
	last := moveTimes(200)
	t.Logf("buffers a move: %.1f at first, %.1f at last", first, last)
	if last > 2*first {
		t.Errorf("a move reads %.1f buffers at last, %.1f at first", last, first)
	}
}

// TestAPlanForAnEmptyLogIsGoodForAFullOne: the relay keeps its plans, and those that Postgres likes best while it knows
// the log to be empty read all of it for each page.
func TestAPlanForAnEmptyLogIsGoodForAFullOne(t *testing.T) {
	t.Parallel()
	url := testenv.PostgresURL(t)
	db, err := postgres.Open(t.Context(), postgres.Config{URL: url, MaxConns: 1, GenericPlans: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(db.Close)
	exec(t, db, `VACUUM ANALYZE`)
	for slot := range 5 { // nobody tells the planner better
		exec(t, db, fmt.Sprintf(`ALTER TABLE outbox_slot_%d SET (autovacuum_enabled = off)`, slot))
	}
	log, at := &eventLog{db: db, maxRows: 500, maxBytes: 4 << 20}, position{base: "1:1:"}
	read := func() (blocks int) {
		t.Helper()
		const sql = `SELECT sum(heap_blks_hit + heap_blks_read + idx_blks_hit + idx_blks_read)::int FROM pg_statio_user_tables WHERE relname LIKE 'outbox_slot_%'`
		exec(t, db, `SELECT pg_stat_force_next_flush()`)
		if err := db.QueryRow(t.Context(), sql).Scan(&blocks); err != nil {
			t.Fatal(err)
		}
		return blocks
	}
	for _, n := range []int{0, 500, 500, 500} {
		if n > 0 {
			fill(t, db, n, 100)
		}
		before := read()
		found, _, err := log.next(t.Context(), at)
		if err != nil || (found != nil) != (n > 0) {
			t.Fatal(found, err)
		}
		if found == nil {
			continue
		}
		at = found.end
		blocks := read() - before
		t.Logf("%d blocks read for a page of %d messages", blocks, n)
		if blocks > 4*n {
			t.Errorf("%d blocks read for a page of %d messages", blocks, n)
		}
		fill(t, db, 20_000, 100)
		if err := db.QueryRow(t.Context(), `SELECT pg_current_snapshot()::text`).Scan(&at.base); err != nil {
			t.Fatal(err)
		}
	}
}

// explain runs a statement and returns how many buffers it touched.
func explain(t *testing.T, db *pgxpool.Pool, sql string, args ...any) int {
	t.Helper()
	var plan []byte
	if err := db.QueryRow(t.Context(), `EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) `+sql,
		args...).Scan(&plan); err != nil {
		t.Fatal(err)
	}
	var parsed []struct {
		Plan struct {
			Hit  int `json:"Shared Hit Blocks"`
			Read int `json:"Shared Read Blocks"`
		}
	}
	if err := json.Unmarshal(plan, &parsed); err != nil {
		t.Fatal(err)
	}
	return parsed[0].Plan.Hit + parsed[0].Plan.Read
}
