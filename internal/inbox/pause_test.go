package inbox

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"example.com/shop/internal/dev/testenv"
	"example.com/shop/internal/messaging"
	"example.com/shop/internal/postgres"
	"github.com/jackc/pgx/v5"
)

func (b *bundle) transact(t *testing.T, fn func(tx pgx.Tx) error) {
	t.Helper()
	if err := postgres.Transact(t.Context(), b.db, fn); err != nil {
		t.Fatal(err)
	}
}

func TestAPausedGroupRunsNothing(t *testing.T) {
	t.Parallel()
	b := setup(t)
	config := eager
	config.PollInterval = 10 * time.Millisecond
	box := b.inbox(config)
	running := make(chan bool, 10)
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	ended := make(chan error, 1)
	go func() {
		ended <- box.WhileResumed(ctx, func(ctx context.Context) error {
			running <- true
			<-ctx.Done()
			running <- false
			return nil
		})
	}()
	runs := func(want bool) {
		t.Helper()
		select {
		case got := <-running:
			if got != want {
				t.Fatalf("runs: %t, want %t", got, want)
			}
		case <-time.After(20 * time.Second):
			t.Fatalf("never became %t", want)
		}
	}
	for range 2 {
		runs(true)
		b.transact(t, func(tx pgx.Tx) error {
			done, err := Pause(t.Context(), tx, "group", "ann", "why")
			if err == nil && !done {
				err = errors.New("was paused")
			}
			return err
		})
		runs(false)
		b.transact(t, func(tx pgx.Tx) error {
			if again, err := Pause(t.Context(), tx, "group", "bob", "why"); again || err != nil {
				t.Errorf("paused twice: %t, %v", again, err)
			}
			return nil
		})
		select {
		case <-running:
			t.Fatal("runs although it is paused")
		case <-time.After(20 * config.PollInterval):
		}
		b.transact(t, func(tx pgx.Tx) error { _, err := Resume(t.Context(), tx, "group"); return err })
	}
	runs(true)
	stop()
	runs(false)
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

// What waits behind the head of a key goes on when the head is skipped; and nothing is moved while a handler may be succeeding.
func TestBury(t *testing.T) {
	t.Parallel()
	b := setup(t)
	box := b.inbox(eager)
	b.on("head", fails)
	key := []messaging.Delivery{probe("k", "head"), probe("k", "second"), probe("k", "third")}
	b.on("other", fails)
	other := probe("l", "other")
	if err := box.Process(t.Context(), append(key, other)); err != nil {
		t.Fatal(err)
	}
	bury := func(whole bool) (moved []string, err error) {
		err = postgres.Transact(t.Context(), b.db, func(tx pgx.Tx) error {
			moved, err = Bury(t.Context(), tx, "group", "k", whole, "skipped by ann")
			return err
		})
		return moved, err
	}
	b.on("head", func(ctx context.Context, _ pgx.Tx) error {
		if _, err := bury(false); !errors.Is(err, ErrBeingTried) {
			t.Errorf("while the handler runs: %v", err)
		}
		return errProbe
	})
	if _, err := box.RetryNext(t.Context()); err != nil {
		t.Fatal(err)
	}
	if moved, err := bury(false); err != nil || !slices.Equal(moved, []string{key[0].ID}) {
		t.Errorf("skipped %v, %v", moved, err)
	}
	testenv.Eventually(t, 10*time.Second, func() error {
		_, err := box.RetryNext(t.Context())
		if err == nil && b.ran("second") == 0 {
			err = errors.New("what was second has not gone on")
		}
		return err
	})
	for range 2 { // the rest, and then there is none
		if _, err := bury(true); err != nil {
			t.Fatal(err)
		}
	}
	var waiting, dead int
	var text string
	err := b.db.QueryRow(t.Context(), `
		SELECT (SELECT count(*) FROM inbox_retry), count(*), min(error) FROM dead_letter WHERE consumer = 'group' AND key = 'k' AND reason = 'skipped'`).
		Scan(&waiting, &dead, &text)
	if err != nil || waiting > 1 || dead < 1 || !strings.HasPrefix(text, "skipped by ann; last error: ") {
		t.Errorf("%d wait, %d dead, %q, %v", waiting, dead, text, err)
	}
}

func TestStandings(t *testing.T) {
	t.Parallel()
	b := setup(t)
	box := b.inbox(Config{})
	b.on("bad", fails)
	if err := box.Process(t.Context(), []messaging.Delivery{probe("k", "bad"), probe("l", "good"), probe("", "better")}); err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() { defer close(ended); box.heartbeat(ctx) }()
	b.transact(t, func(tx pgx.Tx) error { _, err := Pause(t.Context(), tx, "group", "ann", "why"); return err })
	testenv.Eventually(t, 10*time.Second, func() error {
		found, err := GroupStatuses(t.Context(), b.db, []string{"nobody", "group"})
		if err == nil && len(found[1].Applied) == 0 {
			err = errors.New("no heartbeat")
		}
		if err == nil {
			one, applied := found[1], int64(0)
			for _, n := range one.Applied {
				applied += n
			}
			if applied != 2 || one.Lag == nil || *one.Lag > 60 || one.Retrying != 1 || one.Blocked != 1 || one.Paused == nil || one.Paused.Reason != "why" {
				t.Errorf("got %+v", one)
			}
			if none := found[0]; none.Consumer != "nobody" || none.Paused != nil || len(none.Applied) > 0 || none.Lag != nil {
				t.Errorf("of nobody: %+v", none)
			}
		}
		return err
	})
	stop()
	<-ended
	if found, err := GroupStatuses(t.Context(), b.db, []string{"group"}); err != nil || len(found[0].Applied) != 0 {
		t.Errorf("after its end: %+v, %v", found, err)
	}
}
