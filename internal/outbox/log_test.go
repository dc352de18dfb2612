package outbox

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	"example.com/shop/internal/dev/testenv"
	"example.com/shop/internal/messaging"
	"example.com/shop/internal/postgres"
	"github.com/google/go-cmp/cmp"
	"github.com/jackc/pgx/v5"
	"pgregory.net/rapid"
)

func equal(t testing.TB, what string, got, want any) {
	t.Helper()
	if diff := cmp.Diff(want, got); diff != "" {
		t.Fatalf("%s (-want +got):\n%s", what, diff)
	}
}

func TestLogSkipsNothing(t *testing.T) {
	t.Parallel()

	// Breaks a cursor of the form "id > last".
	t.Run("AnIDTakenFirstAndCommittedLast", func(t *testing.T) {
		t.Parallel()
		db := testenv.Postgres(t)
		r := newReader(db)
		slow := openTx(t, db)
		insertIn(t, slow, "", "slow")
		insert(t, db, "", "quick")
		equal(t, "while the slow one is open", r.all(t), []string{"quick"})
		commitTx(t, slow)
		equal(t, "after it", r.all(t), []string{"slow"})
	})

	t.Run("ARollbackLeavesNothing", func(t *testing.T) {
		t.Parallel()
		db := testenv.Postgres(t)
		r := newReader(db)
		undone := openTx(t, db)
		insertIn(t, undone, "", "undone")
		insert(t, db, "", "done")
		equal(t, "before", r.all(t), []string{"done"})
		if err := undone.Rollback(t.Context()); err != nil {
			t.Fatal(err)
		}
		insert(t, db, "", "next")
		equal(t, "after", r.all(t), []string{"next"})
	})

	t.Run("ASubtransaction", func(t *testing.T) {
		t.Parallel()
		db := testenv.Postgres(t)
		r := newReader(db)
		outer := openTx(t, db)
		inner, err := outer.Begin(t.Context()) // a savepoint has its own xid
		if err != nil {
			t.Fatal(err)
		}
		insertIn(t, inner, "", "inner")
		insert(t, db, "", "other")
		equal(t, "before", r.all(t), []string{"other"})
		commitTx(t, inner)
		commitTx(t, outer)
		equal(t, "after", r.all(t), []string{"inner"})
	})
}

// Breaks a watermark of the form "xid < pg_snapshot_xmin".
func TestLogWaitsForNobody(t *testing.T) {
	t.Parallel()

	t.Run("AWriteTransactionOpen", func(t *testing.T) {
		t.Parallel()
		db := testenv.Postgres(t)
		if _, err := openTx(t, db).Exec(t.Context(), `CREATE TABLE other ()`); err != nil {
			t.Fatal(err)
		}
		insert(t, db, "", "quick")
		equal(t, "delivered", newReader(db).all(t), []string{"quick"})
	})

	t.Run("AWriteTransactionOpenInAnotherDatabase", func(t *testing.T) {
		t.Parallel()
		db, other := testenv.Postgres(t), testenv.Postgres(t)
		if _, err := openTx(t, other).Exec(t.Context(), `CREATE TABLE other ()`); err != nil {
			t.Fatal(err)
		}
		insert(t, db, "", "quick")
		equal(t, "delivered", newReader(db).all(t), []string{"quick"})
	})

	t.Run("AnOrphanPreparedTransaction", func(t *testing.T) {
		t.Parallel()
		db := testenv.Preparing(t)
		conn, err := db.Acquire(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Release()
		exec := func(sql string) {
			t.Helper()
			if _, err := conn.Exec(context.WithoutCancel(t.Context()), sql); err != nil {
				t.Fatal(err)
			}
		}
		name := fmt.Sprintf("'orphan of %s'", conn.Conn().Config().Database)
		exec(`BEGIN`)
		exec(`SELECT outbox_insert('probe.Orphan', '', '')`)
		exec(`PREPARE TRANSACTION ` + name)
		defer func() { exec(`ROLLBACK PREPARED ` + name) }()
		insert(t, db, "", "quick")
		equal(t, "delivered", newReader(db).all(t), []string{"quick"})
	})
}

// Breaks an order by xid or by created_at.
func TestLogKeepsTheCommitOrderOfAKey(t *testing.T) {
	t.Parallel()
	db := testenv.Postgres(t)
	first := openTx(t, db)
	if _, err := first.Exec(t.Context(), `SELECT pg_current_xact_id()`); err != nil { // it has the lower xid
		t.Fatal(err)
	}
	insert(t, db, "k", "second starter, committed first")
	insertIn(t, first, "k", "first starter, committed second")
	commitTx(t, first)
	equal(t, "order", newReader(db).all(t), []string{"second starter, committed first", "first starter, committed second"})
}

// Breaks an insert that does not lock the key: it would draw its id before the previous transaction commits. One
// message and several messages use different functions, and each function takes the lock itself.
func TestLogOrdersWritersOfAKeyThatOverlap(t *testing.T) {
	t.Parallel()
	for name, texts := range map[string][]string{"OneMessage": {"second"}, "SeveralMessages": {"second", "fourth"}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			overlap(t, texts)
		})
	}
}

func overlap(t *testing.T, texts []string) {
	t.Helper()
	var messages []messaging.Message
	for _, text := range texts {
		messages = append(messages, probe("k", text))
	}
	db := testenv.Postgres(t)
	first := openTx(t, db)
	insertIn(t, first, "k", "first")
	second := openTx(t, db)
	var pid int
	if err := second.QueryRow(t.Context(), `SELECT pg_backend_pid()`).Scan(&pid); err != nil {
		t.Fatal(err)
	}
	committed := make(chan error, 1)
	go func() {
		err := Insert(t.Context(), second, messages...)
		if err == nil {
			err = second.Commit(t.Context())
		}
		committed <- err
	}()
	// The second writer must wait for the first one's commit.
	testenv.Eventually(t, 10*time.Second, func() error {
		var waits bool
		err := db.QueryRow(t.Context(), `
			SELECT EXISTS (SELECT FROM pg_locks WHERE pid = $1 AND locktype = 'advisory' AND NOT granted)`,
			pid).Scan(&waits)
		if err == nil && !waits {
			err = errors.New("the second writer does not wait")
		}
		return err
	})
	insert(t, db, "another key", "third")
	commitTx(t, first)
	if err := <-committed; err != nil {
		t.Fatal(err)
	}
	equal(t, "order", newReader(db).all(t), append([]string{"first", "third"}, texts...))
}

func TestLogPages(t *testing.T) {
	t.Parallel()

	t.Run("ALargeBatchWithRowsOfASlowTransactionInBetween", func(t *testing.T) {
		t.Parallel()
		db := testenv.Postgres(t)
		r := newReader(db)
		slow := openTx(t, db)
		want := numbered(60)
		insertIn(t, slow, "", want[0])
		insert(t, db, "", "before")
		equal(t, "before the batch", r.all(t), []string{"before"}) // slow is in progress at the base
		for i, text := range want[1:] {
			if i%3 == 0 {
				insertIn(t, slow, "", text)
			} else {
				insert(t, db, "", text)
			}
		}
		stillOpen := openTx(t, db)
		insertIn(t, stillOpen, "", "late")
		commitTx(t, slow)
		equal(t, "the batch, by id", r.all(t), want)
		commitTx(t, stillOpen)
		equal(t, "after the batch", r.all(t), []string{"late"})
	})

	t.Run("WhatIsCommittedMeanwhileComesAfterTheBatch", func(t *testing.T) {
		t.Parallel()
		db := testenv.Postgres(t)
		r := newReader(db)
		for _, text := range numbered(25) {
			insert(t, db, "", text)
		}
		got, _ := r.page(t)
		insert(t, db, "", "meanwhile")
		equal(t, "all", append(got, r.all(t)...), append(numbered(25), "meanwhile"))
	})

	t.Run("AreCutBySizeToo", func(t *testing.T) {
		t.Parallel()
		db := testenv.Postgres(t)
		fill(t, db, 9, 300_000)
		r := newReader(db)
		var sizes []int
		for {
			_, found := r.rawPage(t)
			if found == nil {
				break
			}
			sizes = append(sizes, len(found.rows))
		}
		equal(t, "rows of the pages", sizes, []int{3, 3, 3}) // 1 MiB at most
	})

	t.Run("CanBeResumedAfterEachRow", func(t *testing.T) {
		t.Parallel()
		db := testenv.Postgres(t)
		for _, text := range numbered(25) {
			insert(t, db, "", text)
		}
		r := newReader(db)
		for done := 0; done < 25; {
			got, found := r.page(t)
			for i := range found.rows {
				again := newReader(db) // as a relay after a restart
				again.at = found.before(i)
				equal(t, fmt.Sprintf("resumed after %d", done+i), again.all(t), numbered(25)[done+i:])
			}
			done += len(got)
		}
	})
}

// TestLogAgainstModel runs random interleavings of transactions, some of which share keys, with readers that read
// pages in between and restart at any row. Each committed message must be read once and in the commit order of its
// key. A message that was not committed must never be read.
func TestLogAgainstModel(t *testing.T) {
	t.Parallel()
	db := testenv.Postgres(t)
	at := position{base: "1:1:"}
	rapid.Check(t, func(rt *rapid.T) {
		// The runs share a table, so begin after the rows of earlier runs.
		r := &reader{log: eventLog{db: db, maxRows: rapid.IntRange(1, 5).Draw(rt, "page"), maxBytes: 1 << 20}, at: at}
		r.all(t)
		var open []*modelTx
		var committed, read []string
		next := 0
		end := func(model *modelTx, commit bool) {
			if commit {
				commitTx(t, model.tx)
				committed = append(committed, model.texts...)
			} else if err := model.tx.Rollback(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		rt.Repeat(map[string]func(*rapid.T){
			"begin": func(rt *rapid.T) {
				if len(open) == 4 {
					rt.Skip()
				}
				open = append(open, &modelTx{tx: openTx(t, db)})
			},
			"insert": func(rt *rapid.T) {
				if len(open) == 0 {
					rt.Skip()
				}
				model := rapid.SampledFrom(open).Draw(rt, "tx")
				key := rapid.SampledFrom([]string{"", "a", "b"}).Draw(rt, "key")
				if slices.ContainsFunc(open, func(other *modelTx) bool { return other != model && other.keys[key] }) {
					rt.Skip() // it would wait for the other's commit
				}
				text := fmt.Sprintf("%s/%d", key, next)
				next++
				insertIn(t, model.tx, key, text)
				model.add(key, text)
			},
			"end": func(rt *rapid.T) {
				if len(open) == 0 {
					rt.Skip()
				}
				i := rapid.IntRange(0, len(open)-1).Draw(rt, "tx")
				end(open[i], rapid.Float64().Draw(rt, "fate") < 0.8)
				open = slices.Delete(open, i, i+1)
			},
			"read": func(rt *rapid.T) {
				some, found := r.page(t)
				if found == nil {
					return
				}
				if rapid.Bool().Draw(rt, "crash") { // in the middle of the page; the rows before are recorded
					done := rapid.IntRange(0, len(found.rows)).Draw(rt, "done")
					some, r.at, r.log.bounds = some[:done], found.before(done), bounds{}
				}
				read = append(read, some...)
			},
		})
		for _, model := range open {
			end(model, true)
		}
		read = append(read, r.all(t)...)
		at = r.at
		for _, key := range []string{"", "a", "b"} {
			want, got := ofKey(committed, key), ofKey(read, key)
			if key == "" { // no order promised
				slices.Sort(want)
				slices.Sort(got)
			}
			if diff := cmp.Diff(want, got); diff != "" {
				rt.Fatalf("key %q (-committed +read):\n%s", key, diff)
			}
		}
	})
}

type modelTx struct {
	tx    pgx.Tx
	keys  map[string]bool // the keys that it has locked
	texts []string
}

func (m *modelTx) add(key, text string) {
	if m.keys == nil {
		m.keys = map[string]bool{}
	}
	m.keys[key] = key != ""
	m.texts = append(m.texts, text)
}

func ofKey(all []string, key string) []string {
	found := []string{}
	for _, text := range all {
		if text[:len(key)+1] == key+"/" {
			found = append(found, text)
		}
	}
	return found
}

// TestAllWaysInAreOne checks that every way to insert stores the same row: from another language, from Go, from Go
// without prepared statements, and as one of several messages.
func TestAllWaysInAreOne(t *testing.T) {
	t.Parallel()
	db := testenv.Postgres(t)
	m := probe("k", "same")
	m.Headers = map[string]string{"tenant": "a"}
	inTx(t, db, func(tx pgx.Tx) error { return Insert(t.Context(), tx, m) })
	another := probe("k", "same")
	another.Headers = m.Headers
	inTx(t, db, func(tx pgx.Tx) error { return Insert(t.Context(), tx, m, another) })
	prepares, err := postgres.Open(t.Context(), postgres.Config{URL: db.Config().ConnString()})
	if err != nil {
		t.Fatal(err)
	}
	defer prepares.Close()
	inTx(t, prepares, func(tx pgx.Tx) error { return Insert(t.Context(), tx, m) })
	for _, sql := range []string{
		`SELECT outbox_insert($1, $2, $3, $4)`,
		`INSERT INTO outbox_message (id, type, key, payload, headers) VALUES (outbox_uuidv7(), $1, $2, $3, $4)`,
	} {
		if _, err := db.Exec(t.Context(), sql, m.Type, m.Key, m.Payload, m.Headers); err != nil {
			t.Fatalf("%s: %v", sql, err)
		}
	}
	rows, _ := newReader(db).rawPage(t)
	equal(t, "messages", len(rows), 6)
	for _, row := range rows {
		if err := row.message.Validate(); err != nil {
			t.Error(err)
		}
		row.message.ID, row.message.CreatedAt = m.ID, m.CreatedAt
		equal(t, "message", fmt.Sprint(row.message), fmt.Sprint(m))
	}
}

// A rule substitutes the caller's expression wherever it names the column. Even so, the value that is checked, locked
// and stored must be evaluated only once.
func TestWhatIsInsertedIsEvaluatedOnce(t *testing.T) {
	t.Parallel()
	db := testenv.Postgres(t)
	for _, sql := range []string{
		`CREATE SEQUENCE turns`,
		`CREATE FUNCTION turn(ids uuid[]) RETURNS uuid LANGUAGE sql VOLATILE RETURN ids[nextval('turns')]`,
		// The second value is not a UUIDv7, and must never be evaluated.
		`INSERT INTO outbox_message (id, type, key, payload)
			VALUES (turn(ARRAY[outbox_uuidv7(), gen_random_uuid(), gen_random_uuid()]), 't.T', 'k', '')`,
		`INSERT INTO outbox_message (id, type, key, payload)
			SELECT outbox_uuidv7(), 't.T', nextval('turns')::text, '' FROM generate_series(1, 10)`,
		`INSERT INTO outbox_message (id, type, payload) SELECT outbox_uuidv7(), 't.T', '' FROM generate_series(1, 10)`,
		`INSERT INTO outbox_message (id, type, key, payload)
			SELECT outbox_uuidv7(), 't.T', nextval('turns')::text, '' FROM generate_series(1, 10) ORDER BY random()`,
		// A function that is declared with the wrong volatility.
		`CREATE FUNCTION liar() RETURNS text LANGUAGE plpgsql STABLE AS $$ BEGIN RETURN nextval('turns'); END $$`,
		`INSERT INTO outbox_message (id, type, key, payload) VALUES (outbox_uuidv7(), 't.T', liar(), '')`,
	} {
		if _, err := db.Exec(t.Context(), sql); err != nil {
			t.Fatalf("%s: %v", sql, err)
		}
	}
	var messages, turns int
	const countSQL = `SELECT count(DISTINCT message_id), (SELECT last_value FROM turns) FROM outbox`
	if err := db.QueryRow(t.Context(), countSQL).Scan(&messages, &turns); err != nil {
		t.Fatal(err)
	}
	equal(t, "messages", messages, 32)
	equal(t, "evaluations", turns, 22)
}
