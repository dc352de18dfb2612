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

// TestCostStaysFlat sends 200,000 messages while an old snapshot keeps vacuum from removing rows, and compares what
// Postgres reads for the last thousand with what it read for the first thousand. A queue of row states would fail this
// test, and so would a cursor row that is found by its key.
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
			look := func() { // the explained statement has moved the row, as the relay's own statement does
				t.Helper()
				row := db.QueryRow(t.Context(), `SELECT ctid, moves FROM outbox_cursor`)
				if err := row.Scan(&held.row.tid, &held.moves); err != nil {
					t.Fatal(err)
				}
			}
			// For each transaction in progress anywhere in the cluster, the claim searches the indexes of all five slots,
			// about 10 buffers per page. Other tests run such transactions.
			const perTransaction = 12
			flow := func(messages, page int) (buffers, underWay int) {
				t.Helper()
				for range messages / page {
					fill(t, db, page, 100)
					var open int
					row := db.QueryRow(t.Context(), `SELECT count(*) FROM pg_snapshot_xip($1::pg_snapshot)`, at.base)
					if err := row.Scan(&open); err != nil {
						t.Fatal(err)
					}
					underWay += open
					before := held.moves
					buffers += explain(t, db, claimSQL, int16(0), at.base, 500, 4<<20, held.row.tid,
						at.base, at.batch, at.lastID, 0, 0, held.epoch, held.moves, held.timeline)
					look()
					found, _, err := log.next(t.Context(), at)
					if err != nil || len(found.rows) != page {
						t.Fatalf("%v, %v", found, err)
					}
					at = found.end
					buffers += explain(t, db, moveSQL, int16(0), held.row.tid, held.epoch,
						at.base, at.batch, at.lastID, found.snapshot, 0, 0, held.moves, held.timeline, 0)
					if look(); held.moves != before+2 {
						t.Fatalf("%d moves, want 2", held.moves-before)
					}
				}
				return buffers, underWay
			}
			flow(10_000, 500) // grow the indexes to a depth that lasts
			early, underWayEarly := flow(1000, 100)
			flow(188_000, 500)
			late, underWayLate := flow(1000, 100)
			others := perTransaction * max(0, underWayLate-underWayEarly)
			t.Logf("buffers read for 1,000 messages after 10,000: %d, after 200,000: %d", early, late)
			if float64(late-others) > 1.5*float64(early) {
				t.Errorf("1,000 messages cost %d buffers early and %d late, %d of them for other tests' transactions",
					early, late, others)
			}
		})
	}
}

// TestMovingTheCursorStaysFlat moves a cursor many times while an old snapshot keeps every version of its row. A busy
// relay moves its cursor hundreds of times a second, and finding the row by its key would visit every version.
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
	t.Logf("buffers per move: %.1f at first, %.1f at last", first, last)
	if last > 2*first {
		t.Errorf("a move reads %.1f buffers at last, %.1f at first", last, first)
	}
}

// TestAPlanForAnEmptyLogIsGoodForAFullOne checks the relay's plans, which it keeps. The plans that Postgres prefers
// while it knows that the log is empty read the whole log for each page.
func TestAPlanForAnEmptyLogIsGoodForAFullOne(t *testing.T) {
	t.Parallel()
	url := testenv.PostgresURL(t)
	db, err := postgres.Open(t.Context(), postgres.Config{URL: url, MaxConns: 1, GenericPlans: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(db.Close)
	exec(t, db, `VACUUM ANALYZE`)
	for slot := range 5 { // autovacuum must not update the planner's statistics
		exec(t, db, fmt.Sprintf(`ALTER TABLE outbox_slot_%d SET (autovacuum_enabled = off)`, slot))
	}
	log, at := &eventLog{db: db, maxRows: 500, maxBytes: 4 << 20}, position{base: "1:1:"}
	read := func() (blocks int) {
		t.Helper()
		const sql = `SELECT sum(heap_blks_hit + heap_blks_read + idx_blks_hit + idx_blks_read)::int
			FROM pg_statio_user_tables WHERE relname LIKE 'outbox_slot_%'`
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
	if err := db.QueryRow(t.Context(), `EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) `+sql, args...).Scan(&plan); err != nil {
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
