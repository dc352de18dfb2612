package outbox

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"testing"
	"time"

	"example.com/shop/internal/dev/testenv"
	"example.com/shop/internal/messaging"
	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

const fast = 1e9 // messages per second

func replay(t testing.TB, db *pgxpool.Pool, b *broker, filter ReplayFilter) (published, unroutable int) {
	t.Helper()
	done, err := Replay(t.Context(), db, b, filter, fast, nil)
	if err != nil {
		t.Fatal(err)
	}
	return done.Published, done.Unroutable
}

func TestReplay(t *testing.T) {
	t.Parallel()

	t.Run("ChoosesByTimeTypeKeyAndID", func(t *testing.T) {
		t.Parallel()
		db := testenv.Postgres(t)
		first := probe("a", "m000")
		in(t, db, func(ctx context.Context, tx pgx.Tx) error { return Insert(ctx, tx, first, probe("b", "m001")) })
		between := time.Now()
		insert(t, db, "a", "m002")
		deliver(t, db)
		kind := first.Type
		for name, test := range map[string]struct {
			filter ReplayFilter
			want   []string
		}{
			"All":       {ReplayFilter{}, numbered(3)},
			"Since":     {ReplayFilter{Since: between}, []string{"m002"}},
			"Until":     {ReplayFilter{Until: between}, []string{"m000", "m001"}},
			"Key":       {ReplayFilter{Keys: []string{"a", "c"}}, []string{"m000", "m002"}},
			"Type":      {ReplayFilter{Types: []string{kind}}, numbered(3)},
			"OtherType": {ReplayFilter{Types: []string{"probe.Other"}}, nil},
			"ID":        {ReplayFilter{IDs: []uuid.UUID{first.ID}}, []string{"m000"}},
			"KeySince":  {ReplayFilter{Keys: []string{"a"}, Since: between}, []string{"m002"}},
		} {
			b := newBroker(0)
			published, _ := replay(t, db, b, test.filter)
			equal(t, name, b.stored, test.want)
			equal(t, name+", count", published, len(test.want))
			counted, err := Replay(t.Context(), db, nil, test.filter, fast, nil)
			if err != nil || counted.Published != len(test.want) {
				t.Errorf("%s: dry run counted %d, %v", name, counted.Published, err)
			}
		}
	})

	t.Run("LeavesToTheRelayWhatIsNotDelivered", func(t *testing.T) {
		t.Parallel()
		db := testenv.Postgres(t)
		insert(t, db, "", "m000")
		deliver(t, db)
		insert(t, db, "", "m001")
		b := newBroker(0)
		replay(t, db, b, ReplayFilter{})
		equal(t, "replayed", b.stored, numbered(1))
	})

	t.Run("LeavesOutWhatComesMeanwhile", func(t *testing.T) {
		t.Parallel()
		db := testenv.Postgres(t)
		fillProbes(t, db, replayPage)
		deliver(t, db)
		b := newBroker(0)
		pages := 0
		b.onPage = func([]string) error { // inserts as fast as the replay publishes
			if pages++; pages < 5 {
				fillProbes(t, db, replayPage)
				deliver(t, db)
			}
			return nil
		}
		published, _ := replay(t, db, b, ReplayFilter{})
		equal(t, "published", published, replayPage)
	})

	t.Run("ContinuesThroughFailuresInOrder", func(t *testing.T) {
		t.Parallel()
		db := testenv.Postgres(t)
		const n = 2*replayPage + 50
		in(t, db, func(ctx context.Context, tx pgx.Tx) error {
			for i := range n {
				if err := Insert(ctx, tx, probe("k", fmt.Sprintf("m%03d", i))); err != nil {
					return err
				}
			}
			return nil
		})
		deliver(t, db)
		b := newBroker(0)
		pages := 0
		b.onPage = func([]string) error {
			if pages++; pages == 2 {
				return errors.New("connection lost")
			}
			return nil
		}
		b.verdict = func(text string, _ []string) error {
			switch {
			case text == "m017":
				return messaging.ErrReturned
			case text >= "m300" && pages < 4:
				return messaging.ErrNacked
			}
			return nil
		}
		published, unroutable := replay(t, db, b, ReplayFilter{})
		equal(t, "published, unroutable", []int{published, unroutable}, []int{n - 1, 1})
		want := slices.DeleteFunc(numbered(n), func(text string) bool { return text == "m017" })
		equal(t, "first copies", b.firstCopies(), want)
	})

	t.Run("KeepsToItsRate", func(t *testing.T) {
		t.Parallel()
		db := testenv.Postgres(t)
		fillProbes(t, db, 30)
		deliver(t, db)
		started := time.Now()
		if _, err := Replay(t.Context(), db, newBroker(0), ReplayFilter{}, 100, nil); err != nil {
			t.Fatal(err)
		}
		if took := time.Since(started); took < 280*time.Millisecond {
			t.Errorf("30 messages at 100 per second took %s", took)
		}
	})

	t.Run("ContinuesWhereItWasInterrupted", func(t *testing.T) {
		t.Parallel()
		db := testenv.Postgres(t)
		fillProbes(t, db, 250)
		deliver(t, db)
		setShards(t, db, 2)
		fillProbesFrom(t, db, 250, 260)
		exec(t, db, `UPDATE outbox_cursor SET drained = true`)
		all := newBroker(0)
		replay(t, db, all, ReplayFilter{})

		ctx, cancel := context.WithCancel(t.Context())
		b := newBroker(0)
		first, err := Replay(ctx, db, b, ReplayFilter{}, fast, func(done Replayed) {
			if done.Published != replayPage || done.LastAt.IsZero() {
				t.Errorf("after a page: %+v", done)
			}
			cancel()
		})
		if !errors.Is(err, context.Canceled) || first.Published != replayPage {
			t.Fatalf("interrupted after %+v, %v", first, err)
		}
		rest, err := Replay(t.Context(), db, b, ReplayFilter{After: first.Last}, fast, nil)
		if err != nil || rest.Published != 60 {
			t.Errorf("second replay: %+v, %v", rest, err)
		}
		equal(t, "replayed", b.stored, all.stored)
		var remaining int // in the shard after the place
		if err := db.QueryRow(t.Context(), `SELECT count(*) FROM outbox WHERE shard = 2`).Scan(&remaining); err != nil {
			t.Fatal(err)
		}
		last, err := Replay(t.Context(), db, nil, ReplayFilter{After: Place{Shard: 1, ID: math.MaxInt64}}, fast, nil)
		if err != nil || last.Published != remaining {
			t.Errorf("after the second shard: %+v, %v, want %d", last, err, remaining)
		}
		_, err = Replay(t.Context(), db, b, ReplayFilter{After: Place{Shard: 77, ID: 1}}, fast, nil)
		if !errors.Is(err, errNoShard) {
			t.Errorf("a shard that does not exist: %v", err)
		}
	})

	t.Run("CanBeInterrupted", func(t *testing.T) {
		t.Parallel()
		db := testenv.Postgres(t)
		fillProbes(t, db, 1)
		deliver(t, db)
		ctx, cancel := context.WithCancel(t.Context())
		b := newBroker(0)
		b.onPage = func([]string) error { cancel(); return errors.New("broker down") }
		if _, err := Replay(ctx, db, b, ReplayFilter{}, fast, nil); !errors.Is(err, context.Canceled) {
			t.Errorf("error is %v", err)
		}
	})
}
