package outbox

import (
	"encoding/json"
	"testing"
	"time"

	"example.com/orders/internal/testenv"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

// TestCostStaysFlat lets 200,000 messages flow while somebody holds back what vacuum may remove, and compares what Postgres reads for
// the last thousand with what it read for the first. A queue of row states, or a cursor row that is searched by its key, fails this.
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
			flow := func(messages, page int) (buffers int) {
				t.Helper()
				for range messages / page {
					fill(t, db, page, 100)
					buffers += explain(t, db, openSQL, int16(0), at.base, 500, 4<<20)
					found, _, err := log.next(t.Context(), at)
					if err != nil || len(found.rows) != page {
						t.Fatalf("%v, %v", found, err)
					}
					at = found.end
					buffers += explain(t, db, moveSQL, int16(0), held.tid, held.epoch, at.base, at.batch, at.lastID, found.snapshot, 0, 0)
					// The explained statement has moved the row, as the relay's own does.
					if err := db.QueryRow(t.Context(), `SELECT ctid FROM outbox_cursor`).Scan(&held.tid); err != nil {
						t.Fatal(err)
					}
				}
				return buffers
			}
			first := flow(1000, 100)
			flow(198_000, 500)
			last := flow(1000, 100)
			t.Logf("buffers read for the first 1,000 messages: %d, for the last: %d", first, last)
			if float64(last) > 1.5*float64(first) {
				t.Errorf("the last 1,000 messages cost %d buffers, the first %d", last, first)
			}
		})
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
