package deadletter

import (
	"errors"
	"maps"
	"strings"
	"testing"
	"time"

	"example.com/shop/internal/dev/testenv"
	"example.com/shop/internal/messaging"
	"example.com/shop/internal/postgres"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

func TestMain(m *testing.M) { testenv.Main(m) }

func read(t *testing.T, db *pgxpool.Pool) []Letter {
	t.Helper()
	rows, err := db.Query(t.Context(), `
		SELECT consumer, message_id, type, key, payload, headers, reason, error, attempts FROM dead_letter ORDER BY id`)
	if err != nil {
		t.Fatal(err)
	}
	letters, err := pgx.CollectRows(rows, pgx.RowToStructByPos[Letter])
	if err != nil {
		t.Fatal(err)
	}
	return letters
}

// resolve resolves a dead letter as package ops does.
func resolve(t *testing.T, tx pgx.Tx, id int64, resolution Resolution, note Note) error {
	t.Helper()
	_, err := tx.Exec(t.Context(),
		`UPDATE dead_letter SET resolution = $2, resolved_at = clock_timestamp() WHERE id = $1`, id, resolution)
	if err == nil {
		_, err = tx.Exec(t.Context(),
			`INSERT INTO dead_letter_audit (letter_id, resolution, reason, actor) VALUES ($1, $2, $3, $4)`,
			id, resolution, note.Reason, note.Actor)
	}
	return err
}

func TestInsert(t *testing.T) {
	t.Parallel()

	t.Run("KeepsEveryByteOfThePayload", func(t *testing.T) {
		t.Parallel()
		db := testenv.Postgres(t)
		var every [256]byte
		for i := range every {
			every[i] = byte(i)
		}
		headers := map[string]string{"a": "ü <&>", "": ""}
		want := Letter{"group", "id", "type", "key", every[:], headers, Permanent, "error", 3}
		err := postgres.Transact(t.Context(), db, func(tx pgx.Tx) error {
			return Insert(t.Context(), tx, want, Letter{Reason: NoID})
		})
		if err != nil {
			t.Fatal(err)
		}
		got := read(t, db)
		if len(got) != 2 {
			t.Fatalf("got %d dead letters", len(got))
		}
		if string(got[0].Payload) != string(want.Payload) || !maps.Equal(got[0].Headers, want.Headers) {
			t.Errorf("got payload %q, headers %q", got[0].Payload, got[0].Headers)
		}
		got[0].Payload, got[0].Headers = nil, nil
		bare := Letter{
			Consumer: "group", MessageID: "id", Type: "type", Key: "key",
			Reason: Permanent, Error: "error", Attempts: 3,
		}
		if !equal(got[0], bare) {
			t.Errorf("got %+v", got[0])
		}
		if len(got[1].Payload) != 0 || len(got[1].Headers) != 0 || got[1].Reason != NoID {
			t.Errorf("an empty dead letter became %+v", got[1])
		}
	})

	t.Run("RepairsTextThatPostgresCannotStore", func(t *testing.T) {
		t.Parallel()
		db := testenv.Postgres(t)
		for _, broken := range []string{"\x00", "a\xffb", "\xed\xa0\x80", strings.Repeat("ü\x00", 1<<20)} {
			letter := Letter{
				MessageID: broken, Type: broken, Key: broken, Payload: []byte(broken),
				Headers: map[string]string{broken: broken}, Reason: Malformed, Error: broken,
			}
			err := postgres.Transact(t.Context(), db, func(tx pgx.Tx) error { return Insert(t.Context(), tx, letter) })
			if err != nil {
				t.Fatalf("%.20q: %v", broken, err)
			}
			letters := read(t, db)
			got := letters[len(letters)-1]
			if string(got.Payload) != broken {
				t.Errorf("%.20q: payload became %.20q", broken, got.Payload)
			}
			header := got.Headers[messaging.CleanText(broken)]
			for _, text := range []string{got.MessageID, got.Type, got.Key, got.Error, header} {
				if text != messaging.CleanText(broken) {
					t.Errorf("%.20q became %.20q", broken, text)
				}
			}
		}
	})

	t.Run("IsPartOfTheTransaction", func(t *testing.T) {
		t.Parallel()
		db := testenv.Postgres(t)
		cause := errors.New("cause")
		err := postgres.Transact(t.Context(), db, func(tx pgx.Tx) error {
			if err := Insert(t.Context(), tx, Letter{}); err != nil {
				return err
			}
			return cause
		})
		if !errors.Is(err, cause) || len(read(t, db)) != 0 {
			t.Errorf("got error %v and %d dead letters, want 0", err, len(read(t, db)))
		}
	})

	t.Run("FailsWithTheDatabasesError", func(t *testing.T) {
		t.Parallel()
		db := testenv.Postgres(t)
		err := postgres.Transact(t.Context(), db, func(tx pgx.Tx) error {
			if _, err := tx.Exec(t.Context(), `DROP TABLE dead_letter CASCADE`); err != nil {
				return err
			}
			return Insert(t.Context(), tx, Letter{}, Letter{})
		})
		if err == nil || !strings.HasPrefix(err.Error(), "insert dead letter: ") {
			t.Errorf("got error %v", err)
		}
	})
}

// equal compares everything but payload and headers.
func equal(a, b Letter) bool {
	return a.Consumer == b.Consumer && a.MessageID == b.MessageID && a.Type == b.Type && a.Key == b.Key &&
		a.Reason == b.Reason && a.Error == b.Error && a.Attempts == b.Attempts
}

func TestNothingLeavesSilently(t *testing.T) {
	t.Parallel()
	db := testenv.Postgres(t)
	letter := Letter{MessageID: "id", Headers: map[string]string{}, Reason: Permanent}
	err := postgres.Transact(t.Context(), db, func(tx pgx.Tx) error {
		if err := Insert(t.Context(), tx, letter); err != nil {
			return err
		}
		return resolve(t, tx, 1, Discarded, Note{"ann", "gone"})
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, sql := range []string{
		`DELETE FROM dead_letter`, `TRUNCATE dead_letter CASCADE`,
		`UPDATE dead_letter SET payload = 'x'`, `UPDATE dead_letter SET error = 'x', resolved_at = now()`,
		`DELETE FROM dead_letter_audit`, `TRUNCATE dead_letter_audit`, `UPDATE dead_letter_audit SET actor = 'bob'`,
	} {
		if _, err := db.Exec(t.Context(), sql); err == nil || !strings.Contains(err.Error(), "redrive or discard") {
			t.Errorf("%s: %v", sql, err)
		}
	}
	for _, note := range []Note{{}, {Actor: "ann"}, {Reason: "gone"}} {
		err := postgres.Transact(t.Context(), db, func(tx pgx.Tx) error {
			return resolve(t, tx, 1, Discarded, note)
		})
		if err == nil {
			t.Errorf("accepted the note %+v", note)
		}
	}
	records, err := Audit(t.Context(), db, 1)
	if err != nil || len(records) != 1 || records[0].Actor != "ann" || records[0].Resolution != Discarded {
		t.Errorf("audit log: %+v, %v", records, err)
	}
}

// Two drains may receive copies of one message at the same time. The second sees what the first has stored.
func TestInsertOnceByTwoAtOnce(t *testing.T) {
	t.Parallel()
	db := testenv.Postgres(t)
	begin := func() pgx.Tx {
		t.Helper()
		tx, err := db.Begin(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return tx
	}
	letter := Letter{Consumer: "group", MessageID: "id", Headers: map[string]string{}, Reason: Undelivered}
	first, second := begin(), begin()
	if err := InsertOnce(t.Context(), first, letter); err != nil {
		t.Fatal(err)
	}
	inserted := make(chan error, 1)
	pid := second.Conn().PgConn().PID()
	go func() { inserted <- InsertOnce(t.Context(), second, letter) }()
	testenv.Eventually(t, 10*time.Second, func() error {
		var waits bool
		const sql = `SELECT EXISTS (SELECT FROM pg_locks WHERE pid = $1 AND NOT granted)`
		err := db.QueryRow(t.Context(), sql, pid).Scan(&waits)
		if err == nil && !waits {
			err = errors.New("the second transaction does not wait")
		}
		return err
	})
	for _, step := range []func() error{
		func() error { return first.Commit(t.Context()) },
		func() error { return <-inserted },
		func() error { return second.Commit(t.Context()) },
	} {
		if err := step(); err != nil {
			t.Fatal(err)
		}
	}
	if got := len(read(t, db)); got != 1 {
		t.Errorf("%d dead letters of one message", got)
	}
}

func TestList(t *testing.T) {
	t.Parallel()
	db := testenv.Postgres(t)
	err := postgres.Transact(t.Context(), db, func(tx pgx.Tx) error {
		for _, letter := range []Letter{
			{MessageID: "1", Type: "a", Key: "k", Reason: Unroutable},
			{Consumer: "group", MessageID: "2", Type: "a", Key: "k", Reason: Permanent},
			{Consumer: "group", MessageID: "3", Type: "b", Key: "l", Reason: Exhausted},
			{Consumer: "relay", MessageID: "4", Type: "b", Key: "l", Reason: Exhausted}, // a group named relay is not the relay
		} {
			if err := Insert(t.Context(), tx, letter); err != nil {
				return err
			}
		}
		return resolve(t, tx, 3, Discarded, Note{"ann", "gone"})
	})
	if err != nil {
		t.Fatal(err)
	}
	for name, test := range map[string]struct {
		filter Filter
		want   string
	}{
		"Open":     {Filter{}, "124"},
		"All":      {Filter{Resolved: true}, "1234"},
		"IDs":      {Filter{IDs: []int64{2, 3}}, "2"},
		"Relay":    {Filter{Consumer: Relay}, "1"},
		"Consumer": {Filter{Consumer: "group"}, "2"},
		"Message":  {Filter{MessageID: "2"}, "2"},
		"Type":     {Filter{Type: "b"}, "4"},
		"Key":      {Filter{Key: "k"}, "12"},
		"Reason":   {Filter{Reason: Exhausted}, "4"},
		"Since":    {Filter{Since: time.Now().Add(time.Hour)}, ""},
		"Until":    {Filter{Until: time.Now().Add(-time.Hour)}, ""},
		"Now":      {Filter{Since: time.Now().Add(-time.Hour), Until: time.Now().Add(time.Hour)}, "124"},
	} {
		letters, err := List(t.Context(), db, test.filter, 0, 10)
		got := ""
		for _, letter := range letters {
			got += letter.MessageID
		}
		if err != nil || got != test.want {
			t.Errorf("%s: got %q, %v, want %q", name, got, err, test.want)
		}
	}
	page, err := List(t.Context(), db, Filter{}, 1, 1)
	if err != nil || len(page) != 1 || page[0].ID != 2 {
		t.Errorf("page: %+v, %v", page, err)
	}
}
