package ops

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"example.com/shop/internal/deadletter"
	"example.com/shop/internal/dev/testenv"
	"example.com/shop/internal/operations"
	"example.com/shop/internal/postgres"
	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
)

// park makes n letters of the relay.
func (d *desk) park(t testing.TB, n int) {
	t.Helper()
	ids := make([]uuid.UUID, n)
	for i := range ids {
		ids[i] = uuid.Must(uuid.NewV7())
	}
	d.exec(t, `INSERT INTO dead_letter (consumer, message_id, type, key, payload, headers, reason, error, attempts)
		SELECT '', id, 'type', 'k', '', '{}', 'unroutable', '312', 1 FROM unnest($1::uuid[]) AS id`, ids)
}

// A redriven message may come back as a newer letter, as fast as it is redriven. Every command leaves such letters
// alone.
func TestLettersThatComeMeanwhileAreLeftAlone(t *testing.T) {
	t.Parallel()
	rehearsal := order
	rehearsal.DryRun = true
	for name, test := range map[string]struct {
		order Selection
		do    func(context.Context, *desk, Selection, func(Outcome)) error
	}{
		"Redrive": {order, func(ctx context.Context, d *desk, o Selection, each func(Outcome)) error {
			return Redrive(ctx, d.Pool, o, each)
		}},
		"Discard": {order, func(ctx context.Context, d *desk, o Selection, each func(Outcome)) error {
			return Discard(ctx, d.Pool, o, each)
		}},
		"DryRun": {rehearsal, func(ctx context.Context, d *desk, o Selection, each func(Outcome)) error {
			return Redrive(ctx, d.Pool, o, each)
		}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			d := newDesk(t)
			const n = 250 // more than two pages
			d.park(t, n)
			told, total := 0, int64(0)
			test.order.Begin = func(n int64) { total = n }
			err := test.do(t.Context(), d, test.order, func(o Outcome) {
				if o.Err != nil {
					t.Error(o.Err)
				}
				if told++; told <= 2*n {
					d.park(t, 1)
				}
			})
			if err != nil || told != n || total != n {
				t.Errorf("%d letters of %d, %v; want %d", told, total, err, n)
			}
		})
	}
	t.Run("NoneAtFirst", func(t *testing.T) {
		t.Parallel()
		d := newDesk(t)
		late := order
		late.Begin = func(int64) { d.park(t, 1) }
		equal(t, "outcomes", d.redrive(t, late))
	})
}

// An operator who breaks off sees every letter that was resolved, the one under way included.
func TestBreakingOffCountsWhatWasDone(t *testing.T) {
	t.Parallel()
	t.Run("BetweenLetters", func(t *testing.T) {
		t.Parallel()
		d := newDesk(t)
		d.park(t, 10)
		ctx, breakOff := context.WithCancel(t.Context())
		defer breakOff()
		told := 0
		err := Redrive(ctx, d.Pool, order, func(Outcome) {
			if told++; told == 3 {
				breakOff()
			}
		})
		if !errors.Is(err, context.Canceled) {
			t.Errorf("error: %v", err)
		}
		d.want(t, "resolved", `SELECT count(*)::text FROM dead_letter WHERE resolution IS NOT NULL`, fmt.Sprint(told))
	})
	t.Run("WithinALetter", func(t *testing.T) {
		t.Parallel()
		d := newDesk(t)
		d.park(t, 2)
		// Of a lock for which the redrive waits before its COMMIT, which nothing breaks off.
		holder, err := d.Begin(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer holder.Rollback(t.Context())
		if _, err := holder.Exec(t.Context(), `LOCK TABLE dead_letter_audit IN SHARE MODE`); err != nil {
			t.Fatal(err)
		}
		ctx, breakOff := context.WithCancel(t.Context())
		defer breakOff()
		told, ended := 0, make(chan error)
		go func() {
			ended <- Redrive(ctx, d.Pool, order, func(o Outcome) {
				if told++; o.Resolution != deadletter.Redriven {
					t.Errorf("got %+v", o)
				}
			})
		}()
		testenv.Eventually(t, 10*time.Second, func() error {
			var waiting int
			err := d.QueryRow(t.Context(),
				`SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'`).Scan(&waiting)
			if err == nil && waiting == 0 {
				err = errors.New("the redrive does not wait")
			}
			return err
		})
		breakOff()
		if err := holder.Rollback(t.Context()); err != nil {
			t.Fatal(err)
		}
		if err := <-ended; !errors.Is(err, context.Canceled) || told != 1 {
			t.Errorf("%d letters, error: %v", told, err)
		}
		d.wantLetters(t, "unroutable redriven", "unroutable open")
	})
}

// The message of a durable call goes on only if the call has no result yet: one that has ended is not executed again.
func TestRedriveOfDurableCalls(t *testing.T) {
	t.Parallel()
	const insertSQL = `
		INSERT INTO operation (id, caller, idempotency_key, method, request, request_hash, identity, signature, state,
			response, error, ended_at)
		SELECT $1, 'ann', '', 'm', '', '', '', '', $2, CASE $2 WHEN 'succeeded' THEN ''::bytea END,
			CASE WHEN $2 IN ('failed', 'cancelled') THEN ''::bytea END, CASE WHEN $2 IN ('succeeded', 'failed', 'cancelled') THEN now() END
		WHERE $2 <> 'forgotten'`
	for state, want := range map[string]string{
		"pending": "redriven", "running": "redriven", "succeeded": "duplicate",
		"failed": "ended as failed", "cancelled": "ended as cancelled", "forgotten": "not known",
	} {
		for _, consumer := range []string{"", operations.Consumer} {
			t.Run(state+" of "+consumer, func(t *testing.T) {
				t.Parallel()
				d := newDesk(t)
				id := uuid.Must(uuid.NewV7())
				d.exec(t, insertSQL, id, state)
				letter := deadletter.Letter{Consumer: consumer, MessageID: id.String(), Type: operations.MessageType,
					Reason: deadletter.Exhausted}
				err := postgres.Transact(t.Context(), d.Pool,
					func(tx pgx.Tx) error { return deadletter.Insert(t.Context(), tx, letter) })
				if err != nil {
					t.Fatal(err)
				}
				all := order
				all.Groups = []string{"group", operations.Consumer}
				got := d.redrive(t, all)
				if len(got) != 1 || !strings.Contains(got[0], want) {
					t.Errorf("got %q, want %q", got, want)
				}
				onItsWay := "0"
				if want == "redriven" {
					onItsWay = "1"
				}
				d.want(t, "on its way",
					`SELECT ((SELECT count(*) FROM outbox) + (SELECT count(*) FROM inbox_retry))::text`, onItsWay)
				if strings.HasPrefix(got[0], "refused") {
					equal(t, "discarded", collect(t, func(each func(Outcome)) error {
						return Discard(t.Context(),
							d.Pool, all, each)
					}), "discarded")
				}
			})
		}
	}
}
