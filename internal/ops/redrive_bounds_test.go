package ops

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"example.com/shop/internal/deadletter"
	"example.com/shop/internal/dev/testenv"
	"github.com/google/uuid"
)

// park inserts n dead letters of the relay.
func (f *fixture) park(t testing.TB, n int) {
	t.Helper()
	ids := make([]uuid.UUID, n)
	for i := range ids {
		ids[i] = uuid.Must(uuid.NewV7())
	}
	f.exec(t, `INSERT INTO dead_letter (consumer, message_id, type, key, payload, headers, reason, error, attempts)
		SELECT '', id, 'type', 'k', '', '{}', 'unroutable', '312', 1 FROM unnest($1::uuid[]) AS id`, ids)
}

// A redriven message may become a new dead letter as fast as it is redriven. Every command leaves such dead letters
// alone.
func TestLettersThatComeMeanwhileAreLeftAlone(t *testing.T) {
	t.Parallel()
	dryRun := all
	dryRun.DryRun = true
	for name, test := range map[string]struct {
		selection Selection
		do        func(context.Context, *fixture, Selection, func(Outcome)) error
	}{
		"Redrive": {all, func(ctx context.Context, f *fixture, o Selection, each func(Outcome)) error {
			return Redrive(ctx, f.Pool, o, each)
		}},
		"Discard": {all, func(ctx context.Context, f *fixture, o Selection, each func(Outcome)) error {
			return Discard(ctx, f.Pool, o, each)
		}},
		"DryRun": {dryRun, func(ctx context.Context, f *fixture, o Selection, each func(Outcome)) error {
			return Redrive(ctx, f.Pool, o, each)
		}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := newFixture(t)
			const n = 250 // more than two pages
			f.park(t, n)
			outcomes, total := 0, int64(0)
			test.selection.Begin = func(n int64) { total = n }
			err := test.do(t.Context(), f, test.selection, func(o Outcome) {
				if o.Err != nil {
					t.Error(o.Err)
				}
				if outcomes++; outcomes <= 2*n {
					f.park(t, 1)
				}
			})
			if err != nil || outcomes != n || total != n {
				t.Errorf("%d dead letters of %d, %v; want %d", outcomes, total, err, n)
			}
		})
	}
	t.Run("NoneAtTheBeginning", func(t *testing.T) {
		t.Parallel()
		f := newFixture(t)
		late := all
		late.Begin = func(int64) { f.park(t, 1) }
		equal(t, "outcomes", f.redrive(t, late))
	})
}

// An operator who interrupts sees every dead letter that was resolved, including the current one.
func TestBreakingOffCountsWhatWasDone(t *testing.T) {
	t.Parallel()
	t.Run("BetweenLetters", func(t *testing.T) {
		t.Parallel()
		f := newFixture(t)
		f.park(t, 10)
		ctx, interrupt := context.WithCancel(t.Context())
		defer interrupt()
		outcomes := 0
		err := Redrive(ctx, f.Pool, all, func(Outcome) {
			if outcomes++; outcomes == 3 {
				interrupt()
			}
		})
		if !errors.Is(err, context.Canceled) {
			t.Errorf("error: %v", err)
		}
		f.want(t, "resolved", `SELECT count(*)::text FROM dead_letter WHERE resolution IS NOT NULL`, fmt.Sprint(outcomes))
	})
	t.Run("WithinALetter", func(t *testing.T) {
		t.Parallel()
		f := newFixture(t)
		f.park(t, 2)
		// The redrive waits for this lock before its COMMIT, which nothing interrupts.
		holder, err := f.Begin(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer holder.Rollback(t.Context())
		if _, err := holder.Exec(t.Context(), `LOCK TABLE dead_letter_audit IN SHARE MODE`); err != nil {
			t.Fatal(err)
		}
		ctx, interrupt := context.WithCancel(t.Context())
		defer interrupt()
		outcomes, ended := 0, make(chan error)
		go func() {
			ended <- Redrive(ctx, f.Pool, all, func(o Outcome) {
				if outcomes++; o.Resolution != deadletter.Redriven {
					t.Errorf("got %+v", o)
				}
			})
		}()
		testenv.Eventually(t, 10*time.Second, func() error {
			var waiting int
			err := f.QueryRow(t.Context(), `SELECT count(*) FROM pg_stat_activity
				WHERE datname = current_database() AND wait_event_type = 'Lock'`).Scan(&waiting)
			if err == nil && waiting == 0 {
				err = errors.New("the redrive does not wait")
			}
			return err
		})
		interrupt()
		if err := holder.Rollback(t.Context()); err != nil {
			t.Fatal(err)
		}
		if err := <-ended; !errors.Is(err, context.Canceled) || outcomes != 1 {
			t.Errorf("%d dead letters, error: %v", outcomes, err)
		}
		f.wantLetters(t, "unroutable redriven", "unroutable open")
	})
}
