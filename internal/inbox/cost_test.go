package inbox

import (
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
)

// TestCostStaysFlat compares what Postgres reads with 100 and with 100,000 waiting messages, a third of which are heads
// of keys that are not due. A poll, a batch and the removal of a head cost the same.
func TestCostStaysFlat(t *testing.T) {
	t.Parallel()
	for name, known := range map[string]bool{"WithStatistics": true, "WithoutStatistics": false} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			few, many := costs(t, 100, known), costs(t, 100_000, known)
			for step, cost := range few {
				t.Logf("%s: %d buffers with 100 messages, %d with 100,000", step, cost, many[step])
				// Allow for another level in four indexes, and for the growth of the table.
				if many[step] > 2*cost+40 {
					t.Errorf("%s: %d buffers with 100 messages, %d with 100,000", step, cost, many[step])
				}
			}
		})
	}
}

// costs returns how many buffers each step reads while the given number of messages wait. If known is set, the planner
// has statistics.
func costs(t *testing.T, messages int, known bool) map[string]int {
	t.Helper()
	b := setup(t)
	config := b.db.Config().Copy()
	config.MaxConns = 1 // a session can flush only its own counters
	db, err := pgxpool.NewWithConfig(t.Context(), config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(db.Close)
	b.db = db
	if !known {
		b.exec(t, `ALTER TABLE inbox_retry SET (autovacuum_enabled = off)`)
	}
	box := b.inbox(Config{RetryBase: time.Hour})
	found := map[string]int{}
	step := func(name string, do func()) {
		t.Helper()
		do() // warm up: the first call reads the catalog to plan
		before := b.buffers(t)
		do()
		found[name] = b.buffers(t) - before
	}

	b.on("head", fails)
	process(t, box, probe("k", "head"))
	b.fill(t, messages)
	if known {
		b.exec(t, `VACUUM ANALYZE inbox_retry`)
	}
	step("a poll that finds nothing", func() {
		if retryOne(t, box) {
			t.Error("something was due")
		}
	})
	step("a batch with the key", func() {
		process(t, box, probe("k", "late"), probe("other", "fine"), probe("", "free"))
	})
	step("a poll that finds a message, which fails again", func() {
		b.exec(t, dueSQL, b.group.name)
		if !retryOne(t, box) {
			t.Error("nothing was due")
		}
	})
	b.on("head", nil)
	b.exec(t, dueSQL, b.group.name)
	step("a head that is applied", func() {
		if !retryOne(t, box) {
			t.Error("nothing was due")
		}
	})
	step("a head that is buried", func() {
		if err := b.buryOne(t.Context(), "k", false); err != nil {
			t.Fatal(err)
		}
	})
	b.wantHeads(t)
	return found
}

const dueSQL = `
UPDATE inbox_retry SET due_at = clock_timestamp() WHERE consumer = $1 AND key = 'k' AND due_at IS NOT NULL`

// fill adds waiting messages: a third are heads of other keys that are not due, the rest are behind the head of key k.
func (b *bundle) fill(t *testing.T, messages int) {
	t.Helper()
	good := probe("k", "behind")
	b.exec(t, `ALTER TABLE inbox_retry DISABLE TRIGGER inbox_retry_join`) // the trigger is slow for so many rows
	b.exec(t, `
		INSERT INTO inbox_retry (consumer, message_id, type, key, payload, headers, attempts, due_at, last_error)
		SELECT $1, gen_random_uuid(), $2, CASE WHEN n % 3 = 0 THEN 'key ' || n ELSE 'k' END, $3, '{}', 0,
			CASE WHEN n % 3 = 0 THEN clock_timestamp() + interval '1 h' END, ''
		FROM generate_series(1, $4::int) AS n`, b.group.name, good.Type, good.Payload, messages)
	b.exec(t, `ALTER TABLE inbox_retry ENABLE TRIGGER inbox_retry_join`)
}

// buffers returns how many buffers this session has read of inbox_retry and its indexes.
func (b *bundle) buffers(t *testing.T) (n int) {
	t.Helper()
	b.exec(t, `SELECT pg_stat_force_next_flush()`)
	err := b.db.QueryRow(t.Context(), `
		SELECT heap_blks_hit + heap_blks_read + idx_blks_hit + idx_blks_read FROM pg_statio_user_tables
		WHERE relname = 'inbox_retry'`).Scan(&n)
	if err != nil {
		t.Fatal(err)
	}
	return n
}
