package outbox

import (
	"encoding/binary"
	"errors"
	"strings"
	"testing"
	"time"

	"example.com/shop/internal/dev/testenv"
	"example.com/shop/internal/messaging"
	"example.com/shop/internal/postgres"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

// setBack changes the rows as if the database's clock had been set back by half an hour.
func setBack(t testing.TB, db *pgxpool.Pool) {
	t.Helper()
	exec(t, db, `UPDATE outbox SET created_at = created_at + interval '30 min'`)
	exec(t, db, `UPDATE outbox_cursor
		SET lease_expires_at = lease_expires_at + interval '30 min', moved_at = moved_at + interval '30 min'`)
	exec(t, db, `UPDATE outbox_relay SET expires_at = expires_at + interval '30 min'`)
	exec(t, db, `UPDATE outbox_backlog
		SET measured_at = measured_at + interval '30 min', oldest_at = oldest_at + interval '30 min'`)
}

func TestClockThatIsSetBack(t *testing.T) {
	t.Parallel()

	// The gate closed, and the backlog has been delivered since.
	t.Run("DoesNotKeepTheGateClosed", func(t *testing.T) {
		t.Parallel()
		db := testenv.Postgres(t)
		gate := NewGate(db, GateConfig{MaxMessages: 5})
		fillProbes(t, db, 10)
		if _, err := Measure(t.Context(), db, 0); err != nil {
			t.Fatal(err)
		}
		setBack(t, db)
		deliver(t, db)
		found, err := Measure(t.Context(), db, gateStale)
		if err != nil {
			t.Fatal(err)
		}
		gate.judge(t.Context(), found)
		if err := gate.Check(); err != nil {
			t.Error(err)
		}
	})

	t.Run("MakesNoNegativeAge", func(t *testing.T) {
		t.Parallel()
		db := testenv.Postgres(t)
		insert(t, db, "", "m000")
		setBack(t, db)
		found, err := Measure(t.Context(), db, 0)
		if err != nil || len(found) != 1 {
			t.Fatalf("%v, %v", found, err)
		}
		equal(t, "backlog", found[0], Backlog{Messages: 1})
	})

	t.Run("LetsADeadRelaysShardBeTaken", func(t *testing.T) {
		t.Parallel()
		db := testenv.Postgres(t)
		dead := NewRelay(db, func() messaging.Publisher { return newBroker(0) }, Config{})
		if err := dead.attend(t.Context(), t.Context()); err != nil {
			t.Fatal(err)
		}
		testenv.Eventually(t, 10*time.Second, func() error { // it leads and then falls silent
			if holders(t, db)[0] == "" {
				return errors.New("no relay leads")
			}
			return nil
		})
		dead.leases[0].end()
		<-dead.leases[0].over
		exec(t, db, `UPDATE outbox_cursor SET owner = $1, lease_expires_at = clock_timestamp() + lease`, dead.owner)
		setBack(t, db)
		insert(t, db, "", "m000")
		b := newBroker(1)
		start(t, db, b, Config{})
		await(t, "the message", b.complete)
	})

	// A message delivered a moment ago seems to be in a slot that is almost a full turn of the ring old.
	t.Run("MakesNoSweepForgetTooEarly", func(t *testing.T) {
		t.Parallel()
		db := testenv.Postgres(t)
		const ahead = `clock_timestamp() + outbox_slot_length()`
		exec(t, db, `INSERT INTO outbox (slot, shard, message_id, type, payload, created_at)
			VALUES (outbox_slot(`+ahead+`), 0, outbox_uuidv7(), 't.T', '', `+ahead+`)`)
		deliver(t, db)
		equal(t, "swept", len(sweepNow(t, db, time.Hour)), 0)
		exec(t, db, `UPDATE outbox SET created_at = clock_timestamp() - interval '25 h'`)
		equal(t, "swept when it is old", len(sweepNow(t, db, 24*time.Hour)), 1)
	})

	// A time further ahead than the ring's length is ignored; otherwise the log would never be emptied again.
	t.Run("LeavesNothingForGood", func(t *testing.T) {
		t.Parallel()
		db := testenv.Postgres(t)
		exec(t, db, `INSERT INTO outbox (slot, shard, message_id, type, payload, created_at)
			VALUES (outbox_slot(clock_timestamp() + outbox_slot_length()), 0, outbox_uuidv7(), 't.T', '', '2999-01-01')`)
		deliver(t, db)
		equal(t, "swept", len(sweepNow(t, db, time.Hour)), 1)
	})
}

func TestMaxAgeIsThatOfPostgres(t *testing.T) {
	t.Parallel()
	var oldest time.Duration
	err := testenv.Postgres(t).QueryRow(t.Context(), `SELECT outbox_oldest()`).Scan(&oldest)
	if err != nil || oldest != MaxAge {
		t.Errorf("Postgres says %s, %v", oldest, err)
	}
}

// dated gives a message an ID of the given age. A negative age is in the future.
func dated(m messaging.Message, age time.Duration) messaging.Message {
	var millis [8]byte
	binary.BigEndian.PutUint64(millis[:], uint64(time.Now().Add(-age).UnixMilli()))
	copy(m.ID[:6], millis[2:])
	return m
}

// Every way into the log refuses a time from a wrong clock, even if the caller claims to have checked the message.
func TestWhatAWrongClockDatedIsRefused(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		age     time.Duration
		refused bool
	}{
		"Now":          {0, false},
		"AlmostAhead":  {-9 * time.Minute, false},
		"Ahead":        {-11 * time.Minute, true},
		"FarAhead":     {-200 * 24 * time.Hour, true},
		"OldLetter":    {6*24*time.Hour - time.Minute, false},
		"TooOld":       {6*24*time.Hour + time.Minute, true},
		"OfTheFifties": {50 * 365 * 24 * time.Hour, true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			db := testenv.Postgres(t)
			pooled := pooledPool(t, db)
			prepares, err := postgres.Open(t.Context(), postgres.Config{URL: db.Config().ConnString()})
			if err != nil {
				t.Fatal(err)
			}
			defer prepares.Close()
			m := dated(probe("k", "m"), test.age)
			for way, insert := range map[string]func() error{
				"Insert": func() error { // uses the statement that declares the message checked
					return NewWriter(prepares, nil, nil).Transact(t.Context(), func(tx pgx.Tx) error {
						return Insert(t.Context(), tx, m)
					})
				},
				"InsertMany": func() error {
					return NewWriter(db, nil, nil).Transact(t.Context(), func(tx pgx.Tx) error {
						return Insert(t.Context(), tx, m, probe("k", "innocent"))
					})
				},
				"InsertUnprepared": func() error {
					return NewWriter(pooled, nil, nil).Transact(t.Context(), func(tx pgx.Tx) error {
						return Insert(t.Context(), tx, m)
					})
				},
				"View": func() error {
					_, err := db.Exec(t.Context(),
						`INSERT INTO outbox_message (id, type, payload) VALUES ($1, 't.T', '')`, m.ID.String())
					return blameClock(err)
				},
				"ViewWithoutTheTime": func() error {
					_, err := db.Exec(t.Context(),
						`INSERT INTO outbox_message (id, type, payload, checked) VALUES ($1, 't.T', '', true)`, m.ID.String())
					return blameClock(err)
				},
				"Function": func() error {
					_, err := db.Exec(t.Context(), `SELECT outbox_insert('t.T', 'k', ''::bytea, '{}'::jsonb, $1::uuid)`, m.ID.String())
					return blameClock(err)
				},
			} {
				before := rowsOf(t, db)
				err := insert()
				if errors.Is(err, ErrClock) != test.refused || !test.refused && err != nil {
					t.Errorf("%s: %v", way, err)
				}
				if wrote := rowsOf(t, db) > before; wrote == test.refused {
					t.Errorf("%s: written: %t", way, wrote)
				}
				if test.refused && err != nil && !strings.Contains(err.Error(), "clock") {
					t.Errorf("%s: the error names no clock: %v", way, err)
				}
			}
		})
	}
}

// pooledPool returns a pool that prepares no statements, as through a pooler.
func pooledPool(t testing.TB, db *pgxpool.Pool) *pgxpool.Pool {
	t.Helper()
	config := db.Config()
	config.ConnConfig.DefaultQueryExecMode = pgx.QueryExecModeCacheDescribe
	pooled, err := pgxpool.NewWithConfig(t.Context(), config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(pooled.Close)
	return pooled
}
