package inbox

import (
	"context"
	"fmt"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"example.com/shop/internal/messaging"
	"github.com/jackc/pgx/v5"
)

// makeDue makes all waiting heads due, as if their pauses were over.
func (b *bundle) makeDue(t testing.TB) {
	t.Helper()
	const sql = `UPDATE inbox_retry SET due_at = clock_timestamp() WHERE consumer = $1 AND due_at IS NOT NULL`
	b.exec(t, sql, b.group.name)
}

// A handler sees the same ID, key and headers of its message in every run, so that the ID can be the idempotency key of
// an effect elsewhere.
func TestHandlersSeeTheirMessage(t *testing.T) {
	t.Parallel()
	b := setup(t)
	var seen []messaging.Delivery
	look := func(ctx context.Context, _ pgx.Tx) error {
		delivery, ok := FromContext(ctx)
		if !ok {
			t.Error("the handler has no message")
		}
		seen = append(seen, delivery)
		return nil
	}
	failing := true
	b.on("second", func(ctx context.Context, tx pgx.Tx) error {
		_ = look(ctx, tx)
		if failing {
			return errProbe
		}
		return nil
	})
	b.on("first", look)
	first, second := probe("a", "first"), probe("b", "second")
	p := b.inbox(eager)
	process(t, p, first, second)
	failing = false
	retryAll(t, p)
	b.wantEffects(t, "first", "second")
	// The batch runs both, then each alone, then the second is retried.
	want := []messaging.Delivery{first, second, first, second, second}
	same := slices.EqualFunc(seen, want, func(got, want messaging.Delivery) bool {
		return got.ID == want.ID && got.Type == want.Type && got.Key == want.Key &&
			got.Headers["probe"] == want.Headers["probe"]
	})
	if !same {
		t.Errorf("handlers saw %+v, want %+v", seen, want)
	}
	if _, ok := FromContext(t.Context()); ok {
		t.Error("a context outside of a handler has a message")
	}
}

func TestOrderOfAKeySurvivesFailures(t *testing.T) {
	t.Parallel()

	t.Run("LaterOnesWaitBehindAndOtherKeysGoOn", func(t *testing.T) {
		t.Parallel()
		b := setup(t)
		b.on("k1", fails)
		p := b.inbox(eager)
		process(t, p, probe("other", "o1"), probe("k", "k1"), probe("k", "k2"), probe("", "free"), probe("other", "o2"))
		process(t, b.inbox(eager), probe("k", "k3"), probe("other", "o3"))
		b.wantEffects(t, "o1", "free", "o2", "o3")
		b.wantWaiting(t, "k1 1/1", "k2 0/0", "k3 0/0")
		retryOne(t, p)
		b.wantWaiting(t, "k1 2/2", "k2 0/0", "k3 0/0")
		b.on("k1", nil)
		retryAll(t, p)
		b.wantEffects(t, "o1", "free", "o2", "o3", "k1", "k2", "k3")
		process(t, p, probe("k", "k4")) // nothing waits any more
		b.wantEffects(t, "o1", "free", "o2", "o3", "k1", "k2", "k3", "k4")
	})

	t.Run("NextProceedsWhenTheHeadDies", func(t *testing.T) {
		t.Parallel()
		b := setup(t)
		b.on("k1", fails)
		b.on("k3", fails)
		p := b.inbox(eager)
		process(t, p, probe("k", "k1"), probe("k", "k2"), probe("k", "k3"), probe("k", "k4"))
		retryAll(t, p)
		b.wantDead(t, "exhausted 3", "exhausted 3")
		b.wantEffects(t, "k2", "k4")
		b.wantWaiting(t)
	})

	t.Run("HeadThatIsNotDueBlocksTheOthers", func(t *testing.T) {
		t.Parallel()
		b := setup(t)
		b.on("k1", fails)
		p := b.inbox(Config{RetryBase: time.Hour})
		process(t, p, probe("k", "k1"), probe("k", "k2"))
		if retryOne(t, p) {
			t.Error("retried a message that was not due")
		}
		b.wantEffects(t)
	})

	t.Run("DeliveryInterruptedTwiceIsNotHandledInTheBatch", func(t *testing.T) {
		t.Parallel()
		b := setup(t)
		suspect, once := probe("k", "suspect"), probe("", "once")
		suspect.Count, once.Count = 2, 1
		p := b.inbox(eager)
		process(t, p, once, suspect, probe("k", "behind"), probe("", "free"))
		b.wantEffects(t, "once", "free")
		b.wantWaiting(t, "suspect 0/0", "behind 0/0")
		if ran := b.ran("suspect"); ran != 0 {
			t.Errorf("the handler ran %d times", ran)
		}
		retryAll(t, p)
		b.wantEffects(t, "once", "free", "suspect", "behind")
	})
}

// TestRetryIsOneTransaction looks from another session while the handler of a retry runs: the row still exists, because
// the effect is not committed.
func TestRetryIsOneTransaction(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.on("k1", fails)
	p := b.inbox(eager)
	process(t, p, probe("k", "k1"))
	b.on("k1", func(context.Context, pgx.Tx) error {
		b.wantWaiting(t, "k1 1/2")
		b.wantEffects(t)
		// A later message queues behind, and no other process runs either message.
		process(t, b.inbox(eager), probe("k", "k2"))
		if retryOne(t, b.inbox(eager)) {
			t.Error("another process found a due message")
		}
		return nil
	})
	retryOne(t, p)
	b.wantEffects(t, "k1")
	b.wantWaiting(t, "k2 0/0")
}

// TestRetrySkipsLockedMessages retries while another process is claiming a message. The retry neither waits for that
// message nor claims it, which would count as a start.
func TestRetrySkipsLockedMessages(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.on("locked", fails)
	b.on("free", fails)
	p := b.inbox(eager)
	process(t, p, probe("k", "locked"), probe("k", "behind"))
	process(t, p, probe("", "free"))
	b.on("free", nil)
	err := pgx.BeginFunc(t.Context(), b.db, func(tx pgx.Tx) error {
		_, err := tx.Exec(t.Context(), `SELECT FROM inbox_retry WHERE key = 'k' ORDER BY seq LIMIT 1 FOR UPDATE`)
		if err != nil {
			return err
		}
		// A claim that waits would wait for this transaction, until the timeout.
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		for _, want := range []bool{true, false} {
			if found, err := p.RetryNext(ctx); found != want || err != nil {
				return fmt.Errorf("found %t: %w", found, err)
			}
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	b.wantEffects(t, "free")
	b.wantWaiting(t, "locked 1/1", "behind 0/0")
}

// TestRetriesByManyProcesses checks that messages of a key never run concurrently or out of order, although many
// processes retry them.
func TestRetriesByManyProcesses(t *testing.T) {
	t.Parallel()
	const keys, each, processes = 4, 6, 5
	b := setup(t)
	var batch []messaging.Delivery
	running := map[string]*atomic.Int32{}
	for k := range keys {
		key := string(rune('a' + k))
		running[key] = new(atomic.Int32)
		for i := range each {
			text := key + string(rune('0'+i))
			batch = append(batch, probe(key, text))
			b.on(text, fails)
		}
	}
	process(t, b.inbox(Config{RetryBase: 1}), batch...)
	b.wantEffects(t)
	for _, d := range batch {
		text, n := d.Headers["probe"], running[d.Key]
		failed := new(atomic.Bool)
		b.on(text, func(context.Context, pgx.Tx) error {
			if n.Add(1) > 1 {
				t.Errorf("two handlers run for key %s at once", d.Key)
			}
			defer n.Add(-1)
			if text[1]%2 == 0 && failed.CompareAndSwap(false, true) {
				return errProbe
			}
			return nil
		})
	}
	done := make(chan error)
	for range processes {
		p := b.inbox(Config{RetryBase: 1})
		go func() {
			for {
				if found, err := p.RetryNext(t.Context()); err != nil || !found {
					done <- err
					return
				}
			}
		}()
	}
	for range processes {
		if err := <-done; err != nil {
			t.Fatal(err)
		}
	}
	retryAll(t, b.inbox(Config{RetryBase: 1}))
	b.wantDead(t)
	b.wantWaiting(t)
	got := b.list(t, `SELECT name FROM effects WHERE n = 1 AND consumer = $1 ORDER BY left(name, 1), seq`)
	if len(got) != keys*each || !slices.IsSorted(got) {
		t.Errorf("effects by key are %q", got)
	}
}

func TestRunRetriesUntilItsContextIsDone(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.on("bad", fails)
	p := b.inbox(Config{RetryBase: 1, PollInterval: time.Millisecond})
	process(t, p, probe("", "bad"))
	applied := make(chan struct{})
	ctx, cancel := context.WithCancel(t.Context())
	p.config.AfterCommit = func() { close(applied) }
	b.on("bad", nil)
	ended := make(chan error)
	go func() { ended <- p.Run(ctx) }()
	<-applied
	cancel()
	if err := <-ended; err != nil {
		t.Errorf("run: %v", err)
	}
	b.wantEffects(t, "bad")
}

func TestAfterCommit(t *testing.T) {
	t.Parallel()
	b := setup(t)
	calls := 0
	config := eager
	config.AfterCommit = func() { calls++ }
	p := b.inbox(config)
	want := func(what string, n int) {
		t.Helper()
		if calls != n {
			t.Errorf("%s: called %d times, want %d", what, calls, n)
		}
		calls = 0
	}
	message := probe("", "one")
	process(t, p, message, probe("", "two"))
	want("a batch", 1)
	process(t, p, message)
	want("a duplicate", 0)
	b.on("bad", fails)
	process(t, p, probe("k", "bad"), probe("k", "behind"))
	want("a failure and a message behind it", 0)
	retryOne(t, p)
	want("a retry that failed", 0)
	b.on("bad", nil)
	retryOne(t, p)
	want("a retry", 1)
	nameless := probe("", "nameless")
	nameless.ID = ""
	process(t, p, nameless)
	want("a dead letter", 0)
	ctx, cancel := context.WithCancel(t.Context())
	b.on("cancelled", func(context.Context, pgx.Tx) error { cancel(); return nil })
	if err := p.Process(ctx, []messaging.Delivery{probe("", "cancelled")}); err == nil {
		t.Error("no error although the context was cancelled")
	}
	want("a rollback", 0)
}
