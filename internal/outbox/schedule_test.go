package outbox

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"example.com/shop/internal/dev/testenv"
	"example.com/shop/internal/messaging"
	"example.com/shop/internal/postgres"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

// in runs fn in a transaction.
func in(t testing.TB, db *pgxpool.Pool, fn func(ctx context.Context, tx pgx.Tx) error) {
	t.Helper()
	if err := postgres.Transact(t.Context(), db, func(tx pgx.Tx) error { return fn(t.Context(), tx) }); err != nil {
		t.Fatal(err)
	}
}

func scheduled(t testing.TB, db *pgxpool.Pool, due time.Time, messages ...messaging.Message) {
	t.Helper()
	in(t, db, func(ctx context.Context, tx pgx.Tx) error { return Schedule(ctx, tx, due, messages...) })
}

func latest(t testing.TB, db *pgxpool.Pool, within time.Duration, messages ...messaging.Message) {
	t.Helper()
	in(t, db, func(ctx context.Context, tx pgx.Tx) error { return InsertLatest(ctx, tx, within, messages...) })
}

func moveDue(t testing.TB, db *pgxpool.Pool) (moved int) {
	t.Helper()
	if err := db.QueryRow(t.Context(), `SELECT moved FROM outbox_move_due(100)`).Scan(&moved); err != nil {
		t.Fatal(err)
	}
	return moved
}

func TestSchedule(t *testing.T) {
	t.Parallel()

	t.Run("MovesMessagesInTheOrderOfTheirDueTimes", func(t *testing.T) {
		t.Parallel()
		db := testenv.Postgres(t)
		now := time.Now()
		scheduled(t, db, now.Add(-time.Second), probe("k", "m001"), probe("", "m002"))
		scheduled(t, db, now.Add(-time.Minute), probe("k", "m000"))
		scheduled(t, db, now.Add(time.Hour), probe("k", "later"))
		equal(t, "in the log before", rowsOf(t, db), 0)
		equal(t, "moved", moveDue(t, db), 3)
		equal(t, "moved again", moveDue(t, db), 0)
		equal(t, "messages", newReader(db).all(t), numbered(3))
	})

	// An inbox forgets IDs after days, but a message may be scheduled for next month.
	t.Run("SetsTheTimeInTheID", func(t *testing.T) {
		t.Parallel()
		db := testenv.Postgres(t)
		message := probe("k", "m000")
		for i := range 6 {
			message.ID[i] = 1 // long ago
		}
		scheduled(t, db, time.Now(), message)
		equal(t, "moved", moveDue(t, db), 1)
		rows, _ := newReader(db).rawPage(t)
		got := rows[0].message
		age := time.Since(time.Unix(got.ID.Time().UnixTime()))
		if age > time.Minute || age < -time.Minute || got.ID.Version() != 7 {
			t.Errorf("ID %s is %s old", got.ID, age)
		}
		equal(t, "random bits", fmt.Sprintf("%x", got.ID[7:]), fmt.Sprintf("%x", message.ID[7:]))
	})

	t.Run("IsPartOfTheTransaction", func(t *testing.T) {
		t.Parallel()
		db := testenv.Postgres(t)
		tx := openTx(t, db)
		if err := Schedule(t.Context(), tx, time.Now(), probe("", "never")); err != nil {
			t.Fatal(err)
		}
		equal(t, "moved before the commit", moveDue(t, db), 0)
		if err := tx.Rollback(t.Context()); err != nil {
			t.Fatal(err)
		}
		equal(t, "moved after the rollback", moveDue(t, db), 0)
	})

	t.Run("CanBeCancelled", func(t *testing.T) {
		t.Parallel()
		db := testenv.Postgres(t)
		message := probe("", "never")
		scheduled(t, db, time.Now(), message)
		in(t, db, func(ctx context.Context, tx pgx.Tx) error { return Unschedule(ctx, tx, message.ID) })
		equal(t, "moved", moveDue(t, db), 0)
		err := postgres.Transact(t.Context(), db, func(tx pgx.Tx) error { return Unschedule(t.Context(), tx, message.ID) })
		if !errors.Is(err, ErrNotScheduled) {
			t.Errorf("second time: %v", err)
		}
	})

	t.Run("RefusesWhatTheLogWouldRefuse", func(t *testing.T) {
		t.Parallel()
		db := testenv.Postgres(t)
		tx := openTx(t, db)
		bad := probe("", "x")
		bad.Type = "not a name"
		if err := Schedule(t.Context(), tx, time.Now(), bad); !errors.Is(err, messaging.ErrInvalid) {
			t.Errorf("type: %v", err)
		}
		if err := InsertLatest(t.Context(), tx, time.Second, probe("", "x")); !errors.Is(err, messaging.ErrInvalid) {
			t.Errorf("latest without a key: %v", err)
		}
		for _, insert := range []string{
			`SELECT outbox_schedule(ARRAY[gen_random_uuid()], '{probe.X}', '{k}', '{x}', '{"{}"}', now(), false)`,
			`SELECT outbox_schedule(ARRAY[outbox_uuidv7()], '{not a name}', '{k}', '{x}', '{"{}"}', now(), false)`,
			`SELECT outbox_schedule(ARRAY[outbox_uuidv7()], '{probe.X}', '{""}', '{x}', '{"{}"}', now(), true)`,
			`SELECT outbox_schedule(ARRAY[outbox_uuidv7()], '{probe.X}', '{k}', '{x}',
				ARRAY['{"CC": "x"}'::jsonb], now(), false)`,
		} {
			if _, err := db.Exec(t.Context(), insert); err == nil {
				t.Errorf("accepted: %s", insert)
			}
		}
	})

	t.Run("IsDoneByTheRelay", func(t *testing.T) {
		t.Parallel()
		db := testenv.Postgres(t)
		b := newBroker(2)
		start(t, db, b, Config{PollInterval: 50 * time.Millisecond})
		due := time.Now().Add(300 * time.Millisecond)
		in(t, db, func(ctx context.Context, tx pgx.Tx) error {
			return errors.Join(Schedule(ctx, tx, due, probe("k", "m001")), Insert(ctx, tx, probe("k", "m000")))
		})
		await(t, "both", b.complete)
		equal(t, "stored", b.stored, numbered(2))
		if early := time.Until(due); early > 0 {
			t.Errorf("published %s before it was due", early)
		}
	})
}

func TestInsertLatest(t *testing.T) {
	t.Parallel()

	t.Run("KeepsOneOfEachTypeAndKey", func(t *testing.T) {
		t.Parallel()
		db := testenv.Postgres(t)
		latest(t, db, 0, probe("a", "old"), probe("b", "m001"), probe("a", "older"))
		latest(t, db, time.Hour, probe("a", "m000")) // does not postpone the earlier due time
		scheduled(t, db, time.Now(), probe("a", "m002"))
		equal(t, "moved", moveDue(t, db), 3)
		equal(t, "messages", len(newReader(db).all(t)), 3)
		var texts []string
		r := newReader(db)
		for _, text := range r.all(t) {
			if text != "m001" {
				texts = append(texts, text)
			}
		}
		equal(t, "of a", texts, []string{"m000", "m002"})
	})

	// However many messages are merged, the one committed last for a key is published, and published last.
	t.Run("NeverLosesTheFinalState", func(t *testing.T) {
		t.Parallel()
		db := testenv.Postgres(t)
		exec(t, db, `CREATE TABLE state (key text PRIMARY KEY, n integer NOT NULL)`)
		b := newBroker(0)
		start(t, db, b, Config{PollInterval: 5 * time.Millisecond})
		const keys, each = 4, 50
		var writers sync.WaitGroup
		for k := range keys {
			for range 2 { // two writers per key: the last commit counts, and the table records its number
				writers.Go(func() {
					key := string(rune('a' + k))
					for range each {
						err := postgres.Transact(t.Context(), db, func(tx pgx.Tx) error {
							var n int
							err := tx.QueryRow(t.Context(), `
								INSERT INTO state (key, n) VALUES ($1, 1)
								ON CONFLICT (key) DO UPDATE SET n = state.n + 1 RETURNING n`, key).Scan(&n)
							if err != nil {
								return err
							}
							message := probe(key, fmt.Sprintf("%s%03d", key, n))
							return InsertLatest(t.Context(), tx, 10*time.Millisecond, message)
						})
						if err != nil {
							t.Error(err)
						}
					}
				})
			}
		}
		writers.Wait()
		testenv.Eventually(t, 20*time.Second, func() error {
			b.mu.Lock()
			defer b.mu.Unlock()
			last := map[byte]string{}
			for _, text := range b.stored {
				if text <= last[text[0]] {
					return fmt.Errorf("%s after %s", text, last[text[0]])
				}
				last[text[0]] = text
			}
			for k := range keys {
				if want := fmt.Sprintf("%c%03d", 'a'+k, 2*each); last[want[0]] != want {
					return fmt.Errorf("the last of %c is %s", want[0], last[want[0]])
				}
			}
			return nil
		})
		b.mu.Lock()
		defer b.mu.Unlock()
		if n := len(b.stored); n >= keys*2*each {
			t.Errorf("%d messages for %d changes: nothing was merged", n, keys*2*each)
		}
	})
}

// InsertLatest measures its time by the database's clock, as Schedule does.
func TestInsertLatestCountsByTheDatabasesClock(t *testing.T) {
	t.Parallel()
	db := testenv.Postgres(t)
	testenv.ShiftClock(t, db, time.Hour)
	latest(t, db, time.Minute, probe("k", "m"))
	var waits time.Duration
	err := db.QueryRow(t.Context(), `SELECT due_at - clock_timestamp() FROM outbox_scheduled`).Scan(&waits)
	if err != nil {
		t.Fatal(err)
	}
	if waits > time.Minute || waits < 30*time.Second {
		t.Errorf("the message waits for %s", waits)
	}
}
