package outbox

import (
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"example.com/shop/internal/dev/testenv"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

// published runs a relay until the broker has stored the wanted number of messages, and returns them.
func published(t *testing.T, db *pgxpool.Pool, wanted int) []string {
	t.Helper()
	b := newBroker(wanted)
	stop := start(t, db, b, Config{})
	await(t, "the undelivered messages", b.complete)
	stop()
	return b.stored
}

// moveRows changes a database as if the rows of another cluster had been copied into it, but not its sequences or
// functions. Logical replication does that when the schema comes from migrations. The other cluster has run a million
// more transactions, so by its snapshots everything written here is visible.
func moveRows(t testing.TB, db *pgxpool.Pool) {
	t.Helper()
	leaveBehind(t, db)
	exec(t, db, `UPDATE outbox SET xid = (xid::text::bigint + 1000000)::text::xid8`)
	exec(t, db, `UPDATE outbox_cursor SET system_identifier = 1, batch = NULL, last_id = 0, delivered = format('%s:%s:%s',
		pg_snapshot_xmin(delivered)::text::bigint + 1000000, pg_snapshot_xmax(delivered)::text::bigint + 1000000,
		(SELECT string_agg((xip::text::bigint + 1000000)::text, ',') FROM pg_snapshot_xip(delivered) AS xip))::pg_snapshot`)
}

// leaveBehind resets what is not copied with the rows: the sequences, and the function that distributes messages over
// shards. The copied rows are in another slot than new rows, as they would be after some hours.
func leaveBehind(t testing.TB, db *pgxpool.Pool) {
	t.Helper()
	exec(t, db, `UPDATE outbox SET slot = (slot + 1) % outbox_slots()`)
	exec(t, db, `SELECT outbox_spread(0, 1)`)
	for _, sequence := range sequencesOf(t, db) {
		exec(t, db, `ALTER SEQUENCE `+sequence+` RESTART`)
	}
}

func sequencesOf(t testing.TB, db *pgxpool.Pool) []string {
	t.Helper()
	rows, _ := db.Query(t.Context(), `
		SELECT sequence_name FROM information_schema.sequences
		WHERE sequence_schema = 'public' AND sequence_name NOT LIKE 'goose%'
		UNION SELECT pg_get_serial_sequence(quote_ident(table_name), column_name)::regclass::text
		FROM information_schema.columns
		WHERE table_schema = 'public' AND is_identity = 'YES'
			AND table_name NOT LIKE 'goose%' AND table_name NOT LIKE 'outbox_slot%'`)
	found, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil || len(found) < 5 {
		t.Fatalf("sequences: %v, %v", found, err)
	}
	return found
}

// nothingBehind fails if a sequence would return a number twice, or if messages would go to a shard that no relay
// reads.
func nothingBehind(t testing.TB, db *pgxpool.Pool) {
	t.Helper()
	rows, _ := db.Query(t.Context(),
		`SELECT col FROM sequences_behind() UNION ALL SELECT shard::text FROM outbox_stray_shards() AS shard`)
	if behind, err := pgx.CollectRows(rows, pgx.RowTo[string]); err != nil || len(behind) > 0 {
		t.Errorf("behind: %v, %v", behind, err)
	}
	wantRepaired(t, db)
}

func TestRepairOfMovedRows(t *testing.T) {
	t.Parallel()

	// Ids begin at 1 again, and the cursor has delivered up to 8.
	for name, forgotten := range map[string]bool{"PublishesReusedIDs": false, "PublishesReusedIDsInAnEmptyLog": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			db := testenv.Postgres(t)
			for _, text := range numbered(8) {
				insert(t, db, "k", text)
			}
			published(t, db, 8)
			moveRows(t, db)
			if forgotten {
				exec(t, db, `TRUNCATE outbox`)
			}
			for _, text := range []string{"n1", "n2", "n3"} {
				insert(t, db, "k", text)
			}
			waiting := repair(t, db)
			stored := published(t, db, waiting)
			fresh := slices.DeleteFunc(stored, func(text string) bool { return text[0] == 'm' })
			if !slices.Equal(fresh, []string{"n1", "n2", "n3"}) {
				t.Errorf("published %v", fresh)
			}
			nothingBehind(t, db)
			insert(t, db, "k", "n4")
			equal(t, "published afterwards", published(t, db, 1), []string{"n4"})
		})
	}

	// The clock at the cursor's last move was ahead of this one, so the new rows look older than that move.
	t.Run("PublishesReusedIDsIfTheClockIsBehind", func(t *testing.T) {
		t.Parallel()
		db := testenv.Postgres(t)
		fillProbes(t, db, 8)
		published(t, db, 8)
		moveRows(t, db)
		exec(t, db, `TRUNCATE outbox`)
		insert(t, db, "k", "n1")
		exec(t, db, `UPDATE outbox_cursor SET moved_at = clock_timestamp()`)
		equal(t, "to be published", repair(t, db), 1)
		equal(t, "published", published(t, db, 1), []string{"n1"})
	})

	t.Run("KeepsTheOrderOfAKey", func(t *testing.T) {
		t.Parallel()
		db := testenv.Postgres(t)
		for _, text := range numbered(4) {
			insert(t, db, "k", text)
		}
		exec(t, db, `UPDATE outbox_cursor SET delivered = pg_current_snapshot(), top_id = 4, moved_at = clock_timestamp()`)
		insert(t, db, "k", "u1")
		insert(t, db, "k", "u2")
		moveRows(t, db)
		exec(t, db, `DELETE FROM outbox WHERE id <= 4`) // swept before the move
		insert(t, db, "k", "v1")
		insert(t, db, "k", "v2")
		equal(t, "to be published", repair(t, db), 4)
		equal(t, "published", published(t, db, 4), []string{"u1", "u2", "v1", "v2"})
	})

	// An operator has set the sequence manually, so the ids no longer show that some were used twice.
	t.Run("PublishesWhatIsYoungerThanTheCursor", func(t *testing.T) {
		t.Parallel()
		db := testenv.Postgres(t)
		fillProbes(t, db, 8)
		published(t, db, 8)
		moveRows(t, db)
		insert(t, db, "k", "n1")
		exec(t, db, `SELECT setval(pg_get_serial_sequence('outbox', 'id'), 1000)`)
		equal(t, "to be published", repair(t, db), 1)
		equal(t, "published", published(t, db, 1), []string{"n1"})
	})

	t.Run("SpreadsMessagesOverTheShardsThatAreRead", func(t *testing.T) {
		t.Parallel()
		db := testenv.Postgres(t)
		setShards(t, db, 3)
		exec(t, db, `UPDATE outbox_cursor SET drained = true WHERE retired`)
		moveRows(t, db)
		insert(t, db, "k", "n1") // goes to the drained shard
		equal(t, "to be published", repair(t, db), 1)
		equal(t, "published", published(t, db, 1), []string{"n1"})
		nothingBehind(t, db)
		insert(t, db, "other", "n2")
		equal(t, "published afterwards", published(t, db, 1), []string{"n2"})
	})

	t.Run("MovesEverySequence", func(t *testing.T) {
		t.Parallel()
		db := testenv.Postgres(t)
		exec(t, db, `CREATE TABLE of_the_domain (id bigint GENERATED BY DEFAULT AS IDENTITY, old serial, PRIMARY KEY (id));
			INSERT INTO of_the_domain SELECT FROM generate_series(1, 3);
			INSERT INTO dead_letter (consumer, message_id, type, key, payload, headers, reason, error, attempts)
				SELECT '', n, '', '', '', '{}', '', '', 1 FROM generate_series(1, 3) AS n;
			INSERT INTO dead_letter_audit (letter_id, resolution, reason, actor)
				SELECT 1, 'discarded', 'r', 'a' FROM generate_series(1, 3);
			INSERT INTO operator_audit (action, target, reason, actor) SELECT 'a', 't', 'r', 'a' FROM generate_series(1, 3);
			INSERT INTO inbox_retry (consumer, message_id, type, key, payload, headers, attempts, due_at, last_error)
				SELECT 'c', n, '', 'k', '', '{}', 1, 'infinity', '' FROM generate_series(1, 3) AS n`)
		fillProbes(t, db, 3)
		moveRows(t, db)
		rows, _ := db.Query(t.Context(), `SELECT col FROM sequences_behind() ORDER BY col COLLATE "C"`)
		behind, err := pgx.CollectRows(rows, pgx.RowTo[string])
		if err != nil {
			t.Fatal(err)
		}
		equal(t, "behind", behind, []string{
			"dead_letter.id", "dead_letter_audit.id", "inbox_retry.seq", "of_the_domain.id", "of_the_domain.old",
			"operator_audit.id", "outbox.id",
		})
		repair(t, db)
		nothingBehind(t, db)
		exec(t, db, `INSERT INTO of_the_domain DEFAULT VALUES;
			INSERT INTO inbox_retry (consumer, message_id, type, key, payload, headers, attempts, due_at, last_error)
				VALUES ('c', 'next', '', 'k', '', '{}', 1, 'infinity', '')`)
		var last string
		err = db.QueryRow(t.Context(), `SELECT message_id FROM inbox_retry ORDER BY seq DESC LIMIT 1`).Scan(&last)
		if err != nil || last != "next" {
			t.Errorf("the last message of the key is %q, %v", last, err)
		}
	})

	// Rows were restored manually in the cluster that wrote them: the snapshots are right, and only the sequence is wrong.
	t.Run("InTheSameClusterRepeatsNothing", func(t *testing.T) {
		t.Parallel()
		db := testenv.Postgres(t)
		fillProbes(t, db, 8)
		published(t, db, 8)
		insert(t, db, "k", "u1")
		leaveBehind(t, db)
		insert(t, db, "k", "n1")
		equal(t, "to be published", repair(t, db), 2)
		equal(t, "published", published(t, db, 2), []string{"u1", "n1"})
		nothingBehind(t, db)
	})
}

func TestRepairRefusesWhatItCannotTell(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct{ harm, says string }{
		"NoCursor": {`DELETE FROM outbox_cursor`, "no shard that accepts messages"},
		"ClockBehind": {
			`UPDATE outbox_cursor SET moved_at = clock_timestamp() + interval '1 h'`,
			"which is in the future by this cluster's clock",
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			db := testenv.Postgres(t)
			insert(t, db, "k", "m000")
			moveRows(t, db)
			exec(t, db, test.harm)
			_, err := tryRepair(t, db)
			if err == nil || !strings.Contains(err.Error(), test.says) || strings.Contains(err.Error(), "\n") {
				t.Errorf("error is %v", err)
			}
			equal(t, "rows", rowsOf(t, db), 1)
		})
	}
}

// The repair waits for open transactions and includes their messages. Under another isolation level, it would not see
// them.
func TestRepairSeesWhatItWaitedFor(t *testing.T) {
	t.Parallel()
	db := testenv.Postgres(t)
	exec(t, db, `UPDATE outbox_cursor SET system_identifier = 1`)
	open := openTx(t, db)
	insertIn(t, open, "k", "late")
	tx, err := db.BeginTx(t.Context(), pgx.TxOptions{IsoLevel: pgx.RepeatableRead})
	if err != nil {
		t.Fatal(err)
	}
	_, err = tx.Exec(t.Context(), `SELECT outbox_repair()`)
	if err == nil || !strings.Contains(err.Error(), "READ COMMITTED") {
		t.Fatalf("error is %v", err)
	}
	if err := tx.Rollback(t.Context()); err != nil {
		t.Fatal(err)
	}
	repaired := make(chan int, 1)
	go func() {
		waiting, err := tryRepair(t, db)
		if err != nil || waiting == nil {
			t.Error(err)
			waiting = new(int)
		}
		repaired <- *waiting
	}()
	testenv.Eventually(t, 10*time.Second, func() (err error) {
		var waits bool
		err = db.QueryRow(t.Context(), lockWaitSQL).Scan(&waits)
		if err == nil && !waits {
			err = errors.New("the repair does not wait")
		}
		return err
	})
	commitTx(t, open)
	equal(t, "to be published", <-repaired, 1)
}
