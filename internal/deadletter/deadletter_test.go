package deadletter

import (
	"errors"
	"maps"
	"strings"
	"testing"

	"example.com/orders/internal/messaging"
	"example.com/orders/internal/postgres"
	"example.com/orders/internal/testenv"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

func TestMain(m *testing.M) { testenv.Main(m) }

func read(t *testing.T, db *pgxpool.Pool) []Letter {
	t.Helper()
	rows, err := db.Query(t.Context(), `SELECT consumer, message_id, type, key, payload, headers, reason, error, attempts FROM dead_letter ORDER BY id`)
	if err != nil {
		t.Fatal(err)
	}
	letters, err := pgx.CollectRows(rows, pgx.RowToStructByPos[Letter])
	if err != nil {
		t.Fatal(err)
	}
	return letters
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
		want := Letter{"group", "id", "type", "key", every[:], map[string]string{"a": "ü <&>", "": ""}, Permanent, "error", 3}
		err := postgres.Transact(t.Context(), db, func(tx pgx.Tx) error { return Insert(t.Context(), tx, want, Letter{Reason: NoID}) })
		if err != nil {
			t.Fatal(err)
		}
		got := read(t, db)
		if len(got) != 2 {
			t.Fatalf("got %d letters", len(got))
		}
		if string(got[0].Payload) != string(want.Payload) || !maps.Equal(got[0].Headers, want.Headers) {
			t.Errorf("got payload %q, headers %q", got[0].Payload, got[0].Headers)
		}
		got[0].Payload, got[0].Headers = nil, nil
		if bare := (Letter{Consumer: "group", MessageID: "id", Type: "type", Key: "key", Reason: Permanent, Error: "error", Attempts: 3}); !equal(got[0], bare) {
			t.Errorf("got %+v", got[0])
		}
		if len(got[1].Payload) != 0 || len(got[1].Headers) != 0 || got[1].Reason != NoID {
			t.Errorf("of nothing it made %+v", got[1])
		}
	})

	t.Run("MendsTextThatPostgresCannotStore", func(t *testing.T) {
		t.Parallel()
		db := testenv.Postgres(t)
		for _, broken := range []string{"\x00", "a\xffb", "\xed\xa0\x80", strings.Repeat("ü\x00", 1<<20)} {
			letter := Letter{MessageID: broken, Type: broken, Key: broken, Payload: []byte(broken), Headers: map[string]string{broken: broken}, Reason: Malformed, Error: broken}
			err := postgres.Transact(t.Context(), db, func(tx pgx.Tx) error { return Insert(t.Context(), tx, letter) })
			if err != nil {
				t.Fatalf("%.20q: %v", broken, err)
			}
			letters := read(t, db)
			got := letters[len(letters)-1]
			if string(got.Payload) != broken {
				t.Errorf("%.20q: payload became %.20q", broken, got.Payload)
			}
			for _, text := range []string{got.MessageID, got.Type, got.Key, got.Error, got.Headers[messaging.CleanText(broken)]} {
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
			t.Errorf("got error %v and %d letters, want none", err, len(read(t, db)))
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

// equal compares all but payload and headers.
func equal(a, b Letter) bool {
	return a.Consumer == b.Consumer && a.MessageID == b.MessageID && a.Type == b.Type && a.Key == b.Key &&
		a.Reason == b.Reason && a.Error == b.Error && a.Attempts == b.Attempts
}
