package inbox

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"

	"golang.org/x/sync/errgroup"
)

func TestDuplicates(t *testing.T) {
	t.Parallel()

	t.Run("AreAbsorbedWithinABatch", func(t *testing.T) {
		t.Parallel()
		b := setup(t)
		first, second := probe("", "one"), probe("", "two")
		process(t, b.inbox(Config{}), first, second, first, first)
		b.wantEffects(t, "one", "two")
		b.wantCopies(t, first, 3)
		b.wantCopies(t, second, 1)
	})

	t.Run("AreAbsorbedAcrossBatchesAndRestarts", func(t *testing.T) {
		t.Parallel()
		b := setup(t)
		first, second := probe("k", "one"), probe("k", "two")
		process(t, b.inbox(Config{}), first)
		process(t, b.inbox(Config{}), first, second, first)
		process(t, b.inbox(Config{}), second, first)
		b.wantEffects(t, "one", "two")
		b.wantCopies(t, first, 4)
		b.wantCopies(t, second, 2)
	})

	t.Run("AreAbsorbedWhileTheFirstWaitsOrIsDead", func(t *testing.T) {
		t.Parallel()
		b := setup(t)
		b.on("bad", fails)
		p, bad := b.inbox(Config{MaxAttempts: 2, RetryBase: 1}), probe("k", "bad")
		process(t, p, bad, bad)
		process(t, p, bad)
		b.wantWaiting(t, "bad 1/1")
		retryAll(t, p)
		process(t, p, bad)
		b.wantWaiting(t)
		b.wantDead(t, "exhausted 2")
		b.wantEffects(t)
		b.wantCopies(t, bad, 4)
	})

	t.Run("EmptyBatchHasNoEffect", func(t *testing.T) {
		t.Parallel()
		b := setup(t)
		process(t, b.inbox(Config{}))
		b.wantEffects(t)
	})
}

func TestGroupsAreIndependent(t *testing.T) {
	t.Parallel()
	first := setup(t)
	second := newBundle(first.db, "second")
	good, bad := probe("k", "good"), probe("k", "bad")
	both := []*bundle{first, second}
	for _, b := range both {
		b.on("bad", fails)
		process(t, b.inbox(eager), bad, good)
		process(t, b.inbox(eager), good, bad)
		b.wantWaiting(t, "bad 1/1", "good 0/0")
		b.on("bad", nil)
	}
	retryAll(t, second.inbox(eager))
	second.wantEffects(t, "bad", "good")
	first.wantEffects(t)
	first.wantWaiting(t, "bad 1/1", "good 0/0")
	retryAll(t, first.inbox(eager))
	first.wantEffects(t, "bad", "good")
	for _, b := range both {
		b.wantCopies(t, good, 2)
		b.wantCopies(t, bad, 2)
	}
}

// A key that waits in one group must not block the same key in another.
func TestGroupsDoNotWaitForEachOther(t *testing.T) {
	t.Parallel()
	first := setup(t)
	second := newBundle(first.db, "second")
	first.on("bad", fails)
	process(t, first.inbox(Config{}), probe("k", "bad"))
	process(t, second.inbox(Config{}), probe("k", "good"))
	second.wantEffects(t, "good")
	second.on("bad", fails)
	process(t, second.inbox(eager), probe("k", "bad"))
	second.on("bad", nil)
	retryAll(t, second.inbox(eager))
	second.wantEffects(t, "good", "bad")
}

// TestConcurrentProcessors passes the same batch in different orders to many processes at once, as a failing relay and
// two consumers could.
func TestConcurrentProcessors(t *testing.T) {
	t.Parallel()
	const processes, messages = 16, 60
	b := setup(t)
	b.on("bad", fails)
	deliveries, texts := probes(messages)
	// Mix the kinds: some messages have foreign IDs, and one message fails, so that the batch runs message by message.
	for i := range deliveries {
		if i%3 == 0 {
			deliveries[i].ID = fmt.Sprintf("foreign %d", i)
		}
	}
	bad := probe("", "bad")
	deliveries = append(deliveries, bad)
	var all errgroup.Group
	for i := range processes {
		random := rand.New(rand.NewPCG(uint64(i), 0))
		shuffled := slices.Clone(deliveries)
		random.Shuffle(len(shuffled), func(i, j int) { shuffled[i], shuffled[j] = shuffled[j], shuffled[i] })
		all.Go(func() error { return b.inbox(Config{MaxAttempts: 1}).Process(t.Context(), shuffled) })
	}
	if err := all.Wait(); err != nil {
		t.Fatalf("process: %v", err)
	}
	got := b.list(t, `SELECT format('%s x%s', name, n) FROM effects WHERE consumer = $1 ORDER BY name`)
	want := make([]string, messages)
	for i, text := range texts {
		want[i] = text + " x1"
	}
	if !slices.Equal(got, want) {
		t.Errorf("effects are %q, want each once", got)
	}
	b.wantDead(t, "exhausted 1")
	for _, d := range deliveries {
		b.wantCopies(t, d, processes)
	}
}
