package outbox

import (
	"context"
	"errors"
	"strings"
	"sync"
	"testing"
	"time"

	"example.com/shop/internal/dev/testenv"
	"example.com/shop/internal/messaging"
	"example.com/shop/internal/postgres"
	"example.com/shop/internal/session"
	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
	"go.opentelemetry.io/otel/trace"
)

func inTx(t testing.TB, db *pgxpool.Pool, fn func(tx pgx.Tx) error) {
	t.Helper()
	if err := postgres.Transact(t.Context(), db, fn); err != nil {
		t.Fatal(err)
	}
}

func TestInsertRefusesWhatCouldNeverBePublished(t *testing.T) {
	t.Parallel()
	db := testenv.Postgres(t)
	for name, spoil := range map[string]func(m *messaging.Message){
		"ID of version 4":      func(m *messaging.Message) { m.ID = uuid.New() },
		"no ID":                func(m *messaging.Message) { m.ID = uuid.Nil },
		"no type":              func(m *messaging.Message) { m.Type = "" },
		"type with wildcard":   func(m *messaging.Message) { m.Type = "a.*" },
		"long type":            func(m *messaging.Message) { m.Type = strings.Repeat("a", 256) },
		"long key":             func(m *messaging.Message) { m.Key = strings.Repeat("k", 256) },
		"key with NUL":         func(m *messaging.Message) { m.Key = "a\x00" },
		"key not UTF-8":        func(m *messaging.Message) { m.Key = "\xff" },
		"large payload":        func(m *messaging.Message) { m.Payload = make([]byte, messaging.MaxPayload+1) },
		"header CC":            func(m *messaging.Message) { m.Headers = map[string]string{"CC": "elsewhere"} },
		"header of the broker": func(m *messaging.Message) { m.Headers = map[string]string{"x-delay": "1"} },
		"header of the key":    func(m *messaging.Message) { m.Headers = map[string]string{"message-key": "k"} },
		"header with space":    func(m *messaging.Message) { m.Headers = map[string]string{"a b": ""} },
		"long header":          func(m *messaging.Message) { m.Headers = map[string]string{"a": strings.Repeat("v", 1025)} },
		"header not UTF-8":     func(m *messaging.Message) { m.Headers = map[string]string{"a": "\xff"} },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			m := probe("", "spoilt")
			spoil(&m)
			err := postgres.Transact(t.Context(), db, func(tx pgx.Tx) error {
				return Insert(t.Context(), tx, probe("", "innocent"), m)
			})
			if !errors.Is(err, messaging.ErrInvalid) {
				t.Fatalf("error is %v", err)
			}
		})
	}
	t.Run("duplicate ID", func(t *testing.T) {
		t.Parallel()
		first, second := probe("", "first"), probe("", "second")
		second.ID = first.ID
		for name, insert := range map[string]func(tx pgx.Tx) error{
			"Insert": func(tx pgx.Tx) error {
				return Insert(t.Context(), tx, first, probe("", "innocent"), second)
			},
			"Schedule": func(tx pgx.Tx) error {
				return Schedule(t.Context(), tx, time.Now().Add(time.Hour), first, second)
			},
		} {
			err := postgres.Transact(t.Context(), db, insert)
			if !errors.Is(err, messaging.ErrInvalid) || !strings.Contains(err.Error(), first.ID.String()) {
				t.Errorf("%s: error is %v", name, err)
			}
		}
	})
	t.Cleanup(func() {
		var n int
		if err := db.QueryRow(context.Background(), `SELECT count(*) FROM outbox`).Scan(&n); err != nil || n != 0 {
			t.Errorf("%d rows were written (%v)", n, err)
		}
	})
}

// Postgres refuses every message that Go refuses, so no other writer can insert a message that the relay cannot
// publish.
func TestPostgresRefusesTheSame(t *testing.T) {
	t.Parallel()
	db := testenv.Postgres(t)
	const (
		good            = `'probe.P', 'k', '', '{}', outbox_uuidv7()`
		tooManyHeaders  = `'probe.P', 'k', '', (SELECT jsonb_object_agg('h' || i, '') FROM generate_series(1, 33) i)`
		severalMessages = `ARRAY[outbox_uuidv7(), outbox_uuidv7()], '{probe.P,a.*}', '{k,k}', '{x,x}', '{"{}","{}"}'`
	)
	if _, err := db.Exec(t.Context(), `SELECT outbox_insert(`+good+`)`); err != nil {
		t.Fatal(err)
	}
	for arguments, constraint := range map[string]string{
		`'probe.P', 'k', '', '{}', gen_random_uuid()`: "outbox_message_id_is_uuidv7",
		`'a.*', 'k', ''`:                  "outbox_type_is_protobuf_name",
		`'', 'k', ''`:                     "outbox_type_is_protobuf_name",
		`'probe.P', repeat('k', 256), ''`: "outbox_key_fits",
		`'probe.P', 'k', decode(repeat('00', 1048577), 'hex')`:           "outbox_payload_fits",
		`'probe.P', 'k', '', '{"CC": "elsewhere"}'`:                      "outbox_headers_are_valid",
		`'probe.P', 'k', '', '{"x-delay": "1"}'`:                         "outbox_headers_are_valid",
		`'probe.P', 'k', '', '{"message-key": "k"}'`:                     "outbox_headers_are_valid",
		`'probe.P', 'k', '', '[]'`:                                       "outbox_headers_are_valid",
		`'probe.P', 'k', '', '{"a": 1}'`:                                 "outbox_headers_are_valid",
		`'probe.P', 'k', '', jsonb_build_object('a', repeat('v', 1025))`: "outbox_headers_are_valid",
		tooManyHeaders:  "outbox_headers_are_valid",
		severalMessages: "outbox_type_is_protobuf_name",
	} {
		t.Run(arguments, func(t *testing.T) {
			t.Parallel()
			_, err := db.Exec(t.Context(), `SELECT outbox_insert(`+arguments+`)`)
			var refused *pgconn.PgError
			if !errors.As(err, &refused) || refused.ConstraintName != constraint {
				t.Fatalf("error is %v", err)
			}
		})
	}
}

func TestInsertStoresTheTrace(t *testing.T) {
	t.Parallel()
	db := testenv.Postgres(t)
	span := trace.NewSpanContext(trace.SpanContextConfig{
		TraceID: trace.TraceID{1}, SpanID: trace.SpanID{2}, TraceFlags: trace.FlagsSampled,
	})
	ctx := trace.ContextWithSpanContext(t.Context(), span)
	inTx(t, db, func(tx pgx.Tx) error { return Insert(ctx, tx, probe("", "traced")) })
	rows, _ := newReader(db).rawPage(t)
	equal(t, "traceparent", rows[0].message.Headers["traceparent"],
		"00-01000000000000000000000000000000-0200000000000000-01")
}

// Two transactions call Insert twice each, with the same keys in opposite order. Postgres aborts one of them, and
// Transact runs it again.
func TestInsertSurvivesADeadlock(t *testing.T) {
	t.Parallel()
	db := testenv.Postgres(t)
	var both, done sync.WaitGroup
	both.Add(2)
	for _, keys := range [][]string{{"a", "b"}, {"b", "a"}} {
		first := true
		done.Go(func() {
			err := postgres.Transact(t.Context(), db, func(tx pgx.Tx) error {
				if err := Insert(t.Context(), tx, probe(keys[0], "")); err != nil {
					return err
				}
				if first {
					first = false
					both.Done()
					both.Wait() // each holds one lock now
				}
				return Insert(t.Context(), tx, probe(keys[1], ""))
			})
			if err != nil {
				t.Error(err)
			}
		})
	}
	done.Wait()
	if got := newReader(db).all(t); len(got) != 4 {
		t.Fatalf("%d messages", len(got))
	}
}

// One call with several keys always locks them in the same order, regardless of the order of the messages.
func TestInsertLocksInOneOrder(t *testing.T) {
	t.Parallel()
	db := testenv.Postgres(t)
	var done sync.WaitGroup
	for _, keys := range [][]string{{"a", "b", "c"}, {"c", "b", "a"}, {"b", "c", "a"}} {
		done.Go(func() {
			for range 30 {
				tx, err := db.Begin(t.Context())
				if err == nil {
					err = Insert(t.Context(), tx, probe(keys[0], ""), probe(keys[1], ""), probe(keys[2], ""))
				}
				if err == nil {
					err = tx.Commit(t.Context())
				}
				if err != nil { // such as a deadlock
					t.Error(err)
					return
				}
			}
		})
	}
	done.Wait()
}

func TestWriterRingsAfterTheCommit(t *testing.T) {
	t.Parallel()
	db := testenv.Postgres(t)
	bell := NewLocalBell()
	w := NewWriter(db, bell, nil)
	if err := w.Transact(t.Context(), func(pgx.Tx) error { return errors.New("no") }); err == nil || len(bell) != 0 {
		t.Fatalf("error %v, rings %d", err, len(bell))
	}
	err := w.Transact(t.Context(), func(tx pgx.Tx) error { return Insert(t.Context(), tx, probe("", "")) })
	if err != nil || len(bell) != 1 {
		t.Fatalf("error %v, rings %d", err, len(bell))
	}
}

func TestTheDoorbellRingsLessOftenWhileCommitsNeverCease(t *testing.T) {
	t.Parallel()
	intervals := func(perSecond int64) (milliseconds []int64) {
		last := minNotifyInterval
		for range 5 {
			last = nextInterval(last, perSecond*last.Milliseconds()/1000)
			milliseconds = append(milliseconds, last.Milliseconds())
		}
		return milliseconds
	}
	equal(t, "at 1,000/s", intervals(1000), []int64{4, 8, 16, 32, 32})
	equal(t, "at 200/s", intervals(200), []int64{2, 2, 2, 2, 2})
	equal(t, "after the rate has fallen",
		nextInterval(maxNotifyInterval, 200*maxNotifyInterval.Milliseconds()/1000), minNotifyInterval)
}

func TestNotifyBellReachesAnotherProcess(t *testing.T) {
	t.Parallel()
	url := testenv.PostgresURL(t)
	heard, far := NewLocalBell(), NewNotifyBell(url)
	ctx, cancel := context.WithCancel(t.Context())
	var running sync.WaitGroup
	running.Go(func() { far.Run(ctx) })
	running.Go(func() { session.Listen(ctx, url, Channel, func(string) { heard.Ring() }) })
	<-heard // listening has begun
	far.Ring()
	<-heard
	cancel()
	running.Wait()
}
