package outbox

import (
	"context"
	"fmt"
	"testing"

	"example.com/shop/internal/dev/testenv"
	"example.com/shop/internal/messaging"
	"example.com/shop/internal/postgres"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

func TestMain(m *testing.M) { testenv.Main(m) }

// probe returns a message with a text as its payload.
func probe(key, text string) messaging.Message { return messaging.New(key, wrapperspb.String(text)) }

// insert commits one transaction with one message.
func insert(t testing.TB, db *pgxpool.Pool, key, text string) {
	t.Helper()
	err := postgres.Transact(t.Context(), db, func(tx pgx.Tx) error {
		return Insert(t.Context(), tx,
			probe(key, text))
	})
	if err != nil {
		t.Fatal(err)
	}
}

func exec(t testing.TB, db *pgxpool.Pool, sql string, args ...any) {
	t.Helper()
	if _, err := db.Exec(t.Context(), sql, args...); err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
}

// fillProbes inserts n probes in one transaction, with the texts of numbered.
func fillProbes(t testing.TB, db *pgxpool.Pool, n int) { fillProbesFrom(t, db, 0, n) }

func fillProbesFrom(t testing.TB, db *pgxpool.Pool, from, to int) {
	t.Helper()
	tx := openTx(t, db)
	for _, text := range numbered(to)[from:] {
		insertIn(t, tx, "", text)
	}
	commitTx(t, tx)
}

// openTx begins a transaction that the test must end.
func openTx(t testing.TB, db *pgxpool.Pool) pgx.Tx {
	t.Helper()
	tx, err := db.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = tx.Rollback(context.Background()) })
	return tx
}

func insertIn(t testing.TB, tx pgx.Tx, key, text string) {
	t.Helper()
	if err := Insert(t.Context(), tx, probe(key, text)); err != nil {
		t.Fatal(err)
	}
}

func commitTx(t testing.TB, tx pgx.Tx) {
	t.Helper()
	if err := tx.Commit(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// fill inserts n messages with the texts 0..n-1 in one transaction, quickly.
func fill(t testing.TB, db *pgxpool.Pool, n, size int) {
	t.Helper()
	_, err := db.Exec(t.Context(), `
		SELECT outbox_insert(array_agg(outbox_uuidv7()), array_agg('probe.Filler'::text), array_agg(''::text),
			array_agg(decode(repeat('00', $2), 'hex')), array_agg('{}'::jsonb))
		FROM generate_series(1, $1)`, n, size)
	if err != nil {
		t.Fatal(err)
	}
}

// reader reads the log like a relay that never fails.
type reader struct {
	log eventLog
	at  position
}

func newReader(db *pgxpool.Pool) *reader {
	return &reader{log: eventLog{db: db, maxRows: 10, maxBytes: 1 << 20}, at: position{base: "1:1:"}}
}

// page returns the next page and its texts.
func (r *reader) page(t testing.TB) ([]string, *page) {
	t.Helper()
	rows, found := r.rawPage(t)
	return texts(t, rows), found
}

// rawPage is page for rows that are not probes.
func (r *reader) rawPage(t testing.TB) ([]row, *page) {
	t.Helper()
	found, at, err := r.log.next(t.Context(), r.at)
	if err != nil {
		t.Fatal(err)
	}
	r.at = at
	if found == nil {
		return nil, nil
	}
	r.at = found.end
	return found.rows, found
}

// all reads to the end of the log and returns the texts.
func (r *reader) all(t testing.TB) []string {
	t.Helper()
	var all []string
	for {
		some, found := r.page(t)
		if found == nil {
			return all
		}
		all = append(all, some...)
	}
}

func texts(t testing.TB, rows []row) []string {
	t.Helper()
	found := make([]string, len(rows))
	for i, row := range rows {
		found[i] = text(t, row.message)
	}
	return found
}

func text(t testing.TB, m messaging.Message) string {
	t.Helper()
	var body wrapperspb.StringValue
	if err := proto.Unmarshal(m.Payload, &body); err != nil {
		t.Fatal(err)
	}
	return body.GetValue()
}

func numbered(n int) []string {
	all := make([]string, n)
	for i := range all {
		all[i] = fmt.Sprintf("m%03d", i)
	}
	return all
}

// setShards distributes the outbox over n shards.
func setShards(t testing.TB, db *pgxpool.Pool, n int) {
	t.Helper()
	err := postgres.Transact(t.Context(), db, func(tx pgx.Tx) error {
		_, err := tx.Exec(t.Context(), `SELECT outbox_set_shards($1)`, n)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

// tryRepair repairs the outbox. It returns the number of messages to publish, or nil if there was nothing to repair.
func tryRepair(t testing.TB, db *pgxpool.Pool) (undelivered *int, err error) {
	t.Helper()
	err = postgres.Transact(t.Context(), db, func(tx pgx.Tx) error {
		return tx.QueryRow(t.Context(), `SELECT outbox_repair()`).Scan(&undelivered)
	})
	return undelivered, err
}

// repair repairs an outbox that needs it, and returns the number of messages to publish.
func repair(t testing.TB, db *pgxpool.Pool) int {
	t.Helper()
	undelivered, err := tryRepair(t, db)
	if err != nil || undelivered == nil {
		t.Fatalf("repair: %v, %v", undelivered, err)
	}
	return *undelivered
}

// wantRepaired fails if the outbox still needs a repair.
func wantRepaired(t testing.TB, db *pgxpool.Pool) {
	t.Helper()
	if undelivered, err := tryRepair(t, db); err != nil || undelivered != nil {
		t.Errorf("repaired again: %v, %v", undelivered, err)
	}
}

// lockWaitSQL reports whether a transaction on this database waits for a lock.
const lockWaitSQL = `
SELECT EXISTS (
    SELECT FROM pg_locks
    WHERE NOT granted AND database = (SELECT oid FROM pg_database WHERE datname = current_database()))`
