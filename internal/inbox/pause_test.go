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
				t.Fatalf("part is running: %t, want %t", got, want)
			}
		case <-time.After(20 * time.Second):
			t.Fatalf("running never became %t", want)
		}
	}
	for range 2 {
		runs(true)
		b.transact(t, func(tx pgx.Tx) error {
			done, err := Pause(t.Context(), tx, "group", "ann", "why")
			if err == nil && !done {
				err = errors.New("the group was paused already")
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
			t.Fatal("part runs although the group is paused")
		case <-time.After(20 * config.PollInterval):
		}
		b.transact(t, func(tx pgx.Tx) error {
			_, err := Resume(t.Context(), tx, "group")
			return err
		})
	}
	runs(true)
	stop()
	runs(false)
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

// The messages behind the head of a key continue when the head is skipped. No message is moved while its handler may be
// about to succeed.
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
			err = errors.New("the second message has not run")
		}
		return err
	})
	for range 2 { // the second time, nothing is left
		if _, err := bury(true); err != nil {
			t.Fatal(err)
		}
	}
	var waiting, dead int
	var text string
	err := b.db.QueryRow(t.Context(), `
		SELECT (SELECT count(*) FROM inbox_retry), count(*), min(error)
		FROM dead_letter WHERE consumer = 'group' AND key = 'k' AND reason = 'skipped'`).Scan(&waiting, &dead, &text)
	if err != nil || waiting > 1 || dead < 1 || !strings.HasPrefix(text, "skipped by ann; last error: ") {
		t.Errorf("%d wait, %d dead, %q, %v", waiting, dead, text, err)
	}
}

func TestGroupStatuses(t *testing.T) {
	t.Parallel()
	b := setup(t)
	box := b.inbox(Config{})
	b.on("bad", fails)
	process(t, box, probe("k", "bad"), probe("l", "good"), probe("", "better"))
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() { defer close(ended); box.heartbeat(ctx) }()
	b.transact(t, func(tx pgx.Tx) error {
		_, err := Pause(t.Context(), tx, "group", "ann", "why")
		return err
	})
	testenv.Eventually(t, 10*time.Second, func() error {
		found, err := GroupStatuses(t.Context(), b.db, []string{"unknown", "group"})
		if err == nil && len(found[1].Applied) == 0 {
			err = errors.New("no heartbeat")
		}
		if err == nil {
			group, applied := found[1], int64(0)
			for _, n := range group.Applied {
				applied += n
			}
			if applied != 2 || group.Lag == nil || *group.Lag > 60 || group.Retrying != 1 || group.Blocked != 1 ||
				group.Paused == nil || group.Paused.Reason != "why" {
				t.Errorf("got %+v", group)
			}
			none := found[0]
			if none.Consumer != "unknown" || none.Paused != nil || len(none.Applied) > 0 || none.Lag != nil {
				t.Errorf("unknown group: %+v", none)
			}
		}
		return err
	})
	stop()
	<-ended
	if found, err := GroupStatuses(t.Context(), b.db, []string{"group"}); err != nil || len(found[0].Applied) != 0 {
		t.Errorf("after the end of the consumer: %+v, %v", found, err)
	}
}
