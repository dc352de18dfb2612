package inbox

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"time"

	"example.com/shop/internal/dev/testenv"
	"example.com/shop/internal/messaging"
	"example.com/shop/internal/postgres"
	"github.com/jackc/pgx/v5"
	"golang.org/x/sync/errgroup"
)

// TestAMessageThatJoinsAKeyIsNeverLeftBehind lets a message join a key while the head of the key leaves, in every order
// of events.
func TestAMessageThatJoinsAKeyIsNeverLeftBehind(t *testing.T) {
	t.Parallel()
	db := setup(t).db
	// begin makes a key with one waiting message, and the two transactions.
	begin := func(t *testing.T) (b *bundle, leaves, joins pgx.Tx) {
		t.Helper()
		b = newBundle(db, t.Name())
		b.on("head", fails)
		process(t, b.inbox(eager), probe("k", "head"))
		b.on("head", nil)
		var all [2]pgx.Tx
		for i := range all {
			tx, err := db.Begin(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = tx.Rollback(context.WithoutCancel(t.Context())) })
			all[i] = tx
		}
		return b, all[0], all[1]
	}
	leave := func(t *testing.T, b *bundle, tx pgx.Tx) {
		t.Helper()
		if _, err := tx.Exec(t.Context(), `DELETE FROM inbox_retry WHERE consumer = $1`, b.group.name); err != nil {
			t.Fatal(err)
		}
	}
	join := func(ctx context.Context, b *bundle, tx pgx.Tx) error {
		return b.inbox(eager).queue(ctx, tx, []queued{{probe("k", "behind"), waitingTurn}})
	}
	commit := func(t *testing.T, tx pgx.Tx) {
		t.Helper()
		if err := tx.Commit(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	end := func(t *testing.T, b *bundle) {
		t.Helper()
		b.wantWaiting(t, "behind 0/0")
		retryAll(t, b.inbox(eager))
		b.wantEffects(t, "behind")
	}

	t.Run("ItJoinsAndCommitsFirst", func(t *testing.T) {
		t.Parallel()
		b, leaves, joins := begin(t)
		leave(t, b, leaves)
		if err := join(t.Context(), b, joins); err != nil { // joining does not wait for the leaving head
			t.Fatal(err)
		}
		commit(t, joins)
		b.wantHeads(t)
		commit(t, leaves)
		end(t, b)
	})

	t.Run("TheHeadCommitsWhileItJoins", func(t *testing.T) {
		t.Parallel()
		b, leaves, joins := begin(t)
		leave(t, b, leaves)
		if err := join(t.Context(), b, joins); err != nil {
			t.Fatal(err)
		}
		left := make(chan error, 1)
		go func() { left <- leaves.Commit(t.Context()) }()
		awaitLock(t, b, leaves)
		commit(t, joins)
		if err := <-left; err != nil {
			t.Fatal(err)
		}
		end(t, b)
	})

	t.Run("ItJoinsWhileTheHeadCommits", func(t *testing.T) {
		t.Parallel()
		b, leaves, joins := begin(t)
		leave(t, b, leaves)
		// Run the deferred trigger, as COMMIT would.
		if _, err := leaves.Exec(t.Context(), `SET CONSTRAINTS inbox_retry_promote IMMEDIATE`); err != nil {
			t.Fatal(err)
		}
		joined := make(chan error, 1)
		go func() { joined <- join(t.Context(), b, joins) }()
		awaitLock(t, b, joins)
		commit(t, leaves)
		if err := <-joined; err != nil {
			t.Fatal(err)
		}
		commit(t, joins)
		end(t, b)
	})

	t.Run("TheHeadStays", func(t *testing.T) {
		t.Parallel()
		b, leaves, joins := begin(t)
		leave(t, b, leaves)
		if err := join(t.Context(), b, joins); err != nil {
			t.Fatal(err)
		}
		if err := leaves.Rollback(t.Context()); err != nil {
			t.Fatal(err)
		}
		commit(t, joins)
		b.wantWaiting(t, "head 1/1", "behind 0/0")
		retryAll(t, b.inbox(eager))
		b.wantEffects(t, "head", "behind")
	})

	t.Run("ItDoesNotCommit", func(t *testing.T) {
		t.Parallel()
		b, leaves, joins := begin(t)
		if err := join(t.Context(), b, joins); err != nil {
			t.Fatal(err)
		}
		leave(t, b, leaves)
		if err := joins.Rollback(t.Context()); err != nil {
			t.Fatal(err)
		}
		commit(t, leaves)
		b.wantWaiting(t)
	})
}

// awaitLock waits until the transaction waits for a lock.
func awaitLock(t *testing.T, b *bundle, tx pgx.Tx) {
	t.Helper()
	pid := tx.Conn().PgConn().PID()
	testenv.Eventually(t, 10*time.Second, func() error {
		var waits bool
		const sql = `SELECT EXISTS (SELECT FROM pg_locks WHERE pid = $1 AND NOT granted)`
		err := b.db.QueryRow(t.Context(), sql, pid).Scan(&waits)
		if err == nil && !waits {
			err = errors.New("the transaction does not wait for a lock")
		}
		return err
	})
}

// A message waits only once, even if two operators redrive it.
func TestAMessageIsRedrivenOnceByTwo(t *testing.T) {
	t.Parallel()
	db := setup(t).db
	for name, key := range map[string]string{"WithAKey": "k", "WithoutAKey": ""} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := newBundle(db, t.Name())
			message := probe(key, "one")
			b.on("one", func(context.Context, pgx.Tx) error { return messaging.Permanent(errProbe) })
			process(t, b.inbox(eager), message) // taken, and dead
			first, err := db.Begin(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			second, err := db.Begin(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if err := Requeue(t.Context(), first, b.group.name, message, true); err != nil {
				t.Fatal(err)
			}
			requeued := make(chan error, 1)
			go func() { requeued <- Requeue(t.Context(), second, b.group.name, message, true) }()
			awaitLock(t, b, second)
			if err := first.Commit(t.Context()); err != nil {
				t.Fatal(err)
			}
			if err := <-requeued; !errors.Is(err, ErrTaken) {
				t.Errorf("got error %v, want %v", err, ErrTaken)
			}
			if err := second.Rollback(t.Context()); err != nil {
				t.Fatal(err)
			}
			b.wantWaiting(t, "one 0/0")
		})
	}
}

// TestNoKeyIsLeftWaiting lets many processes fail, retry and bury messages of a few keys at once. A key with waiting
// messages always has a head, and in the end every message is applied or dead.
func TestNoKeyIsLeftWaiting(t *testing.T) {
	t.Parallel()
	const processes, batches, each = 4, 30, 4
	b := setup(t)
	random := rand.New(rand.NewPCG(1, 1))
	var mu sync.Mutex
	chance := func(percent int) bool {
		mu.Lock()
		defer mu.Unlock()
		return random.IntN(100) < percent
	}
	ctx, stop := context.WithCancel(t.Context())
	var work, chores errgroup.Group
	for p := range processes {
		work.Go(func() error {
			box := b.inbox(Config{MaxAttempts: 4, RetryBase: 1})
			for i := range batches {
				var batch []messaging.Delivery
				for j := range each {
					text := fmt.Sprint(p, "-", i, "-", j)
					b.on(text, func(context.Context, pgx.Tx) error {
						if chance(40) {
							return errProbe
						}
						return nil
					})
					batch = append(batch, probe(string(rune('a'+j%3)), text))
				}
				if err := box.Process(ctx, batch); err != nil {
					return err
				}
			}
			return nil
		})
		chores.Go(func() error {
			box := b.inbox(Config{MaxAttempts: 4, RetryBase: 1})
			for ctx.Err() == nil {
				if _, err := box.RetryNext(ctx); err != nil && ctx.Err() == nil {
					return err
				}
			}
			return nil
		})
	}
	chores.Go(func() error {
		for ctx.Err() == nil {
			if err := b.buryOne(ctx, "a", chance(20)); err != nil && ctx.Err() == nil {
				return err
			}
			b.wantHeads(t)
		}
		return nil
	})
	if err := work.Wait(); err != nil {
		t.Error(err)
	}
	stop()
	if err := chores.Wait(); err != nil {
		t.Error(err)
	}
	retryAll(t, b.inbox(Config{MaxAttempts: 4, RetryBase: 1}))
	b.wantWaiting(t)
	ended := b.list(t, `
		SELECT name FROM effects WHERE consumer = $1 AND n = 1
		UNION ALL SELECT headers ->> 'probe' FROM dead_letter WHERE consumer = $1`)
	slices.Sort(ended)
	if n := len(slices.Compact(ended)); n != processes*batches*each {
		t.Errorf("%d messages are applied or dead, want %d", n, processes*batches*each)
	}
}

// buryOne buries the head of a key, or all its waiting messages.
func (b *bundle) buryOne(ctx context.Context, key string, whole bool) error {
	err := postgres.Transact(ctx, b.db, func(tx pgx.Tx) error {
		_, err := Bury(ctx, tx, b.group.name, key, whole, "probe")
		return err
	})
	if errors.Is(err, ErrBeingTried) {
		return nil
	}
	return err
}
