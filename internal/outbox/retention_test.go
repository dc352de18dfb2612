package outbox

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"example.com/shop/internal/dev/testenv"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

// shortSlots makes the ring of slots wrap around within seconds.
func shortSlots(t testing.TB, db *pgxpool.Pool, length time.Duration) {
	t.Helper()
	exec(t, db, fmt.Sprintf(`CREATE OR REPLACE FUNCTION outbox_slot_length() RETURNS interval
		LANGUAGE sql IMMUTABLE PARALLEL SAFE RETURN interval '%d milliseconds'`, length.Milliseconds()))
}

// nextSlot waits until new rows go to another slot than now, and returns that slot.
func nextSlot(t testing.TB, db *pgxpool.Pool) (slot int16) {
	t.Helper()
	now := func() (slot int16) {
		if err := db.QueryRow(t.Context(), `SELECT outbox_slot(clock_timestamp())`).Scan(&slot); err != nil {
			t.Fatal(err)
		}
		return slot
	}
	was := now()
	testenv.Eventually(t, 10*time.Second, func() error {
		if slot = now(); slot == was {
			return errors.New("same slot")
		}
		return nil
	})
	return slot
}

// inOneSlot returns a database with two rows in one slot that has ended: a committed row, delivered or not, and a row
// of an open transaction. On a busy machine a slot may end between the rows. Then inOneSlot starts over.
func inOneSlot(t *testing.T, length time.Duration, delivered bool) (db *pgxpool.Pool, open pgx.Tx) {
	t.Helper()
	for same := false; !same; {
		db = testenv.Postgres(t)
		shortSlots(t, db, length)
		nextSlot(t, db)
		insert(t, db, "", "m000")
		if delivered {
			deliver(t, db)
		}
		open = openTx(t, db)
		insertIn(t, open, "", "late")
		const sql = `SELECT count(*) = 2 AND count(DISTINCT slot) = 1 FROM outbox`
		if err := open.QueryRow(t.Context(), sql).Scan(&same); err != nil {
			t.Fatal(err)
		}
		nextSlot(t, db)
	}
	return db, open
}

// deliver moves the cursor past every message in the log.
func deliver(t testing.TB, db *pgxpool.Pool) {
	t.Helper()
	exec(t, db, `UPDATE outbox_cursor SET delivered = pg_current_snapshot()`)
}

func rowsOf(t testing.TB, db *pgxpool.Pool) (n int) {
	t.Helper()
	if err := db.QueryRow(t.Context(), `SELECT count(*) FROM outbox`).Scan(&n); err != nil {
		t.Fatal(err)
	}
	return n
}

func sweepNow(t testing.TB, db *pgxpool.Pool, retention time.Duration) []int16 {
	t.Helper()
	slots, err := sweep(t.Context(), db, retention)
	if err != nil {
		t.Fatal(err)
	}
	return slots
}

func TestSweep(t *testing.T) {
	t.Parallel()
	const length = 500 * time.Millisecond

	t.Run("EmptiesWhatIsDeliveredAndOld", func(t *testing.T) {
		t.Parallel()
		db := testenv.Postgres(t)
		shortSlots(t, db, 2*time.Second)
		slot := nextSlot(t, db)
		insert(t, db, "", "m000")
		deliver(t, db)
		equal(t, "the slot of now", len(sweepNow(t, db, 0)), 0)
		nextSlot(t, db)
		equal(t, "within the retention", len(sweepNow(t, db, time.Hour)), 0)
		equal(t, "past the retention", sweepNow(t, db, 0), []int16{slot})
		equal(t, "rows", rowsOf(t, db), 0)
	})

	t.Run("KeepsWhatIsNotDelivered", func(t *testing.T) {
		t.Parallel()
		db, open := inOneSlot(t, length, false) // the slot has ended when the open transaction commits
		equal(t, "swept", len(sweepNow(t, db, 0)), 0)
		deliver(t, db)
		equal(t, "swept while its writer is open", len(sweepNow(t, db, 0)), 0)
		commitTx(t, open)
		for range 9 { // the ring wraps around: old and new rows share a slot
			insert(t, db, "", "more")
			nextSlot(t, db)
			equal(t, "swept", len(sweepNow(t, db, 0)), 0)
		}
		equal(t, "rows", rowsOf(t, db), 11)
		r := newReader(db)
		equal(t, "messages", len(r.all(t)), 11)
	})

	// A writer commits a row into the slot while the sweep, which did not see the row, waits for that writer.
	t.Run("LooksAgainUnderTheLock", func(t *testing.T) {
		t.Parallel()
		db, open := inOneSlot(t, length, true)
		swept := make(chan []int16, 1)
		met := false
		for !met {
			go func() {
				slots, err := sweep(context.Background(), db, 0)
				if err != nil {
					t.Error(err)
				}
				swept <- slots
			}()
			for !met && len(swept) == 0 {
				err := db.QueryRow(t.Context(), lockWaitSQL).Scan(&met)
				if err != nil {
					t.Fatal(err)
				}
			}
			if met {
				commitTx(t, open)
			}
			equal(t, "swept", len(<-swept), 0)
		}
		equal(t, "rows", rowsOf(t, db), 2)
	})

	t.Run("LeavesASlotToAnotherSweep", func(t *testing.T) {
		t.Parallel()
		db := testenv.Postgres(t)
		shortSlots(t, db, length)
		slot := nextSlot(t, db)
		insert(t, db, "", "m000")
		next := nextSlot(t, db)
		insert(t, db, "", "m001")
		deliver(t, db)
		nextSlot(t, db)
		other := openTx(t, db)
		lockSQL := fmt.Sprintf(`LOCK TABLE ONLY outbox_slot_%d IN ACCESS EXCLUSIVE MODE`, next)
		if _, err := other.Exec(t.Context(), lockSQL); err != nil {
			t.Fatal(err)
		}
		equal(t, "swept", sweepNow(t, db, 0), []int16{slot})
		commitTx(t, other)
		equal(t, "swept", sweepNow(t, db, 0), []int16{next})
	})

	t.Run("OfADrainedShardDoesNotWait", func(t *testing.T) {
		t.Parallel()
		db := testenv.Postgres(t)
		shortSlots(t, db, length)
		insert(t, db, "k", "m000")
		setShards(t, db, 2)
		nextSlot(t, db)
		equal(t, "swept before it is drained", len(sweepNow(t, db, 0)), 0)
		exec(t, db, `UPDATE outbox_cursor SET drained = true WHERE retired`)
		equal(t, "swept", len(sweepNow(t, db, 0)), 1)
	})
}

// TestSizeStaysFlat lets the ring wrap around several times. The log's size at the end of a turn is what one turn
// writes.
func TestSizeStaysFlat(t *testing.T) {
	t.Parallel()
	db := testenv.Postgres(t)
	const length = 150 * time.Millisecond
	shortSlots(t, db, length)
	size := func() (bytes int) {
		t.Helper()
		err := db.QueryRow(t.Context(), `
			SELECT sum(pg_total_relation_size(relid)) FROM pg_partition_tree('outbox') WHERE isleaf`).Scan(&bytes)
		if err != nil {
			t.Fatal(err)
		}
		return bytes
	}
	turn := func() (most int) {
		t.Helper()
		for range 8 {
			fill(t, db, 300, 200)
			nextSlot(t, db)
			deliver(t, db)
			sweepNow(t, db, 2*length)
			most = max(most, size())
		}
		return most
	}
	first := turn()
	var last int
	for range 4 {
		last = turn()
	}
	t.Logf("most bytes in the first turn of the ring: %d, in the last: %d", first, last)
	if last > first*13/10 {
		t.Errorf("the log grew from %d to %d bytes", first, last)
	}
}

// Postgres plans a function that it cannot inline again for every insert, which shows only in the time that inserts
// take.
func TestTheSlotOfANewRowIsInlined(t *testing.T) {
	t.Parallel()
	db := testenv.Postgres(t)
	rows, _ := db.Query(t.Context(), `EXPLAIN (VERBOSE, COSTS off)
		SELECT outbox_slot(clock_timestamp()), outbox_shard(key, message_id) FROM outbox_scheduled`)
	plan, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		t.Fatal(err)
	}
	text := strings.Join(plan, "\n")
	if strings.Contains(text, "outbox_slot(") || strings.Contains(text, "outbox_shard(") {
		t.Errorf("a function is called:\n%s", text)
	}
}
