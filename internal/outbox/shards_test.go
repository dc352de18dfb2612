package outbox

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"example.com/shop/internal/dev/testenv"
	"example.com/shop/internal/messaging"
	"example.com/shop/internal/postgres"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

func TestShare(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		holders string // one letter per shard; "." if it is free
		relays  string
		take    []int16
		give    int16
	}{
		"AllIsFree":                               {"....", "a", []int16{0, 1, 2, 3}, none},
		"AllIsFreeForTwo":                         {"....", "ab", []int16{0, 1}, none},
		"TheRestIsFree":                           {"bb..", "ab", []int16{2, 3}, none},
		"ANewcomerIsGivenOne":                     {"aaaa", "ab", nil, 3},
		"AndAnother":                              {"aaab", "ab", nil, 2},
		"AndNoMore":                               {"aabb", "ab", nil, none},
		"OneMoreThanAnotherIsFair":                {"aab", "ab", nil, none},
		"MoreRelaysThanShards":                    {"b", "abc", nil, none},
		"OfADeadRelayIsNotTakenTooEarly":          {"aaxx", "a", nil, none},
		"OfADeadRelayWhenItIsFree":                {"aa..", "a", []int16{2, 3}, none},
		"ThirdOfFour":                             {"aabb", "abc", nil, 1},
		"AStarvedRelayWhoseRegistrationExpired":   {"..", "", []int16{0, 1}, none},
		"AStarvedRelayWhoseRegistrationIsMissing": {"b..", "b", []int16{1, 2}, none},
		"NothingToShare":                          {"", "a", nil, none},
	} {
		t.Run(name, func(t *testing.T) {
			var view []shardView
			for i, holder := range test.holders {
				view = append(view, shardView{
					int16(i), true, strings.Trim(string(holder), "."), strings.Split(test.relays, ""),
				})
			}
			take, give := share(view, "a")
			equal(t, "take", take, test.take)
			equal(t, "give", give, test.give)
		})
	}
}

// startFleet runs several relays on one broker.
func startFleet(t *testing.T, db *pgxpool.Pool, b *broker, n int) (stops []func()) {
	t.Helper()
	config := Config{PageRows: 7, Lease: time.Second, PollInterval: 20 * time.Millisecond}
	for range n {
		ctx, cancel := context.WithCancel(context.Background())
		relay := NewRelay(db, func() messaging.Publisher { return b }, config)
		var running sync.WaitGroup
		running.Go(func() {
			if err := relay.Run(ctx); err != nil {
				t.Error(err)
			}
		})
		running.Go(func() { relay.Listen(ctx, db.Config().ConnString()) })
		stop := func() { cancel(); running.Wait() }
		t.Cleanup(stop)
		stops = append(stops, stop)
	}
	return stops
}

// holders returns the owners of the shards that can be read, in the order of the shards.
func holders(t *testing.T, db *pgxpool.Pool) []string {
	t.Helper()
	rows, err := db.Query(t.Context(), `SELECT owner FROM outbox_cursor WHERE NOT drained AND NOT retired ORDER BY shard`)
	if err != nil {
		t.Fatal(err)
	}
	owners, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		t.Fatal(err)
	}
	return owners
}

func TestShardsAreSharedOut(t *testing.T) {
	t.Parallel()
	db := testenv.Postgres(t)
	setShards(t, db, 4)
	b := newBroker(0)
	stops := startFleet(t, db, b, 2)
	shared := func(relays int) func() error {
		return func() error {
			load := map[string]int{}
			for _, owner := range holders(t, db) {
				load[owner]++
			}
			if len(load) != relays || load[""] != 0 {
				return fmt.Errorf("holders are %v, want %d relays", load, relays)
			}
			for _, n := range load {
				if n > (4+relays-1)/relays {
					return fmt.Errorf("not fair: %v", load)
				}
			}
			return nil
		}
	}
	testenv.Eventually(t, 20*time.Second, shared(2))
	third := startFleet(t, db, b, 1)
	testenv.Eventually(t, 20*time.Second, shared(3))
	stops[0]()
	testenv.Eventually(t, 20*time.Second, shared(2))
	third[0]()
	testenv.Eventually(t, 20*time.Second, shared(1))
	var listed int
	if err := db.QueryRow(t.Context(), `SELECT count(*) FROM outbox_relay`).Scan(&listed); err != nil || listed != 1 {
		t.Errorf("%d relays are listed, %v", listed, err)
	}
}

// The number of shards changes repeatedly while writers insert messages and two relays publish them. The broker must
// receive every message, and the first copies of each key in the order of their commits.
func TestChangingTheShardsLosesAndReordersNothing(t *testing.T) {
	t.Parallel()
	db := testenv.Postgres(t)
	b := newBroker(0)
	startFleet(t, db, b, 2)
	const keys, each = 6, 60
	var writers sync.WaitGroup
	for k := range keys {
		writers.Go(func() {
			key := string(rune('a' + k))
			for i := range each {
				err := postgres.Transact(t.Context(), db, func(tx pgx.Tx) error {
					return Insert(t.Context(), tx, probe(key, fmt.Sprintf("%s%03d", key, i)))
				})
				if err != nil {
					t.Error(err)
				}
			}
		})
	}
	for _, n := range []int{4, 1, 3} {
		setShards(t, db, n)
	}
	writers.Wait()
	testenv.Eventually(t, 30*time.Second, func() error {
		var left int
		const leftSQL = `SELECT count(*) FROM outbox_cursor WHERE retired AND NOT drained`
		if err := db.QueryRow(t.Context(), leftSQL).Scan(&left); err != nil || left > 0 {
			return fmt.Errorf("%d retired shards are not drained, %v", left, err)
		}
		b.mu.Lock()
		defer b.mu.Unlock()
		if n := len(b.firstCopies()); n < keys*each {
			return fmt.Errorf("%d of %d published", n, keys*each)
		}
		return nil
	})
	b.mu.Lock()
	defer b.mu.Unlock()
	for k := range keys {
		key := string(rune('a' + k))
		var got, want []string
		for _, text := range b.firstCopies() {
			if strings.HasPrefix(text, key) {
				got = append(got, text)
			}
		}
		for i := range each {
			want = append(want, fmt.Sprintf("%s%03d", key, i))
		}
		equal(t, "first copies of "+key, got, want)
	}
	equal(t, "shards", len(holders(t, db)), 3)
}

func TestANewGenerationWaitsForTheOldOne(t *testing.T) {
	t.Parallel()
	db := testenv.Postgres(t)
	insert(t, db, "k", "m000")
	setShards(t, db, 2)
	insert(t, db, "k", "m001")
	for shard := range int16(2) {
		if _, _, err := acquire(t.Context(), db, 1+shard, "eager", time.Hour); !errors.Is(err, errNotLeased) {
			t.Fatalf("shard %d of the new generation: %v", 1+shard, err)
		}
	}
	old, at, err := acquire(t.Context(), db, 0, "old", time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	equal(t, "retired", old.retired.Load(), true)
	r := newReader(db)
	r.at = at
	equal(t, "in the old shard", r.all(t), []string{"m000"})
	if err := old.drain(t.Context()); !errors.Is(err, errDrained) {
		t.Fatal(err)
	}
	if _, _, err := acquire(t.Context(), db, 0, "old", time.Hour); !errors.Is(err, errNotLeased) {
		t.Errorf("a drained shard: %v", err)
	}
	var all []string
	for shard := range int16(2) {
		_, at, err := acquire(t.Context(), db, 1+shard, "new", time.Hour)
		if err != nil {
			t.Fatal(err)
		}
		r := &reader{log: eventLog{db: db, shard: 1 + shard, maxRows: 10, maxBytes: 1 << 20}, at: at}
		all = append(all, r.all(t)...)
	}
	equal(t, "in the new shards", all, []string{"m001"})
}
