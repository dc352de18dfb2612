package inbox

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"example.com/shop/internal/dev/testenv"
	"example.com/shop/internal/messaging"
	"github.com/google/uuid"
)

// brief is an inbox whose slots last only so long.
func (b *bundle) brief(slot time.Duration) *Inbox {
	box := b.inbox(Config{})
	box.ring = ring{slot}
	return box
}

func (b *bundle) remembered(t testing.TB) (n int) {
	t.Helper()
	if err := b.db.QueryRow(t.Context(), `SELECT count(*) FROM inbox`).Scan(&n); err != nil {
		t.Fatal(err)
	}
	return n
}

// aged makes a delivery whose ID was made so long ago.
func aged(age time.Duration, text string) messaging.Delivery {
	d := probe("", text)
	d.ID = bornAt(time.Now().Add(-age))
	return d
}

func sweepOnce(t testing.TB, box *Inbox) []int16 {
	t.Helper()
	slots, err := box.sweep(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return slots
}

func TestSweepForgetsOnlyWhatIsRefused(t *testing.T) {
	t.Parallel()
	b := setup(t)
	box := b.brief(time.Hour)
	memory := box.ring.memory()
	if box.ring.window() >= memory || memory+box.ring.skew() >= (slots-1)*box.ring.slot {
		t.Fatalf("window %s, memory %s and skew %s leave no time to sweep", box.ring.window(), memory, box.ring.skew())
	}
	oldest := aged(box.ring.window()-time.Second, "oldest")
	process(t, box, oldest, aged(0, "fresh"))
	if slots := sweepOnce(t, box); len(slots) != 0 {
		t.Fatalf("swept %v", slots)
	}
	process(t, box, oldest) // a copy
	b.wantEffects(t, "oldest", "fresh")
	var copies int
	if err := b.db.QueryRow(t.Context(), `SELECT max(copies) FROM inbox`).Scan(&copies); err != nil || copies != 2 {
		t.Errorf("%d copies, %v", copies, err)
	}

	older := aged(memory+time.Second, "older")
	exec(t, b.db, `UPDATE inbox SET message_id = $1 WHERE message_id = $2`, older.ID, oldest.ID) // as time passes
	if slots := sweepOnce(t, box); len(slots) != 1 {
		t.Fatalf("swept %v", slots)
	}
	if n := b.remembered(t); n != 1 {
		t.Errorf("%d are remembered", n)
	}
	process(t, box, older)
	b.wantEffects(t, "oldest", "fresh")
	b.wantDead(t, "outside_window 0")
}

func TestSweepOfForeignIDs(t *testing.T) {
	t.Parallel()
	b := setup(t)
	box := b.inbox(Config{})
	one, other := probe("", "one"), probe("", "other")
	one.ID, other.ID = "one", uuid.NewString()
	process(t, box, one, other)
	exec(t, b.db, `UPDATE inbox SET received_at = clock_timestamp() - interval '8 days' WHERE message_id = $1`, other.ID)
	exec(t, b.db, `UPDATE inbox SET received_at = clock_timestamp() - interval '8 days' WHERE message_id <> $1`, other.ID)
	process(t, box, probe("", "fresh"))
	exec(t, b.db, `
		INSERT INTO inbox (slot, consumer, message_id, received_at)
		SELECT -1, 'group', gen_random_uuid(), clock_timestamp() - interval '8 days' FROM generate_series(1, 25000)`)
	sweepOnce(t, box)
	if n := b.remembered(t); n != 1 {
		t.Errorf("%d are remembered", n)
	}
}

// Whoever holds a slot, be it another sweep, delays the sweep of that slot alone.
func TestSweepWaitsForNobody(t *testing.T) {
	t.Parallel()
	for name, sql := range map[string]string{
		"AReader":      `SELECT FROM inbox_slot_3`,
		"AnotherSweep": `LOCK TABLE ONLY inbox_slot_3 IN ACCESS EXCLUSIVE MODE`,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := setup(t)
			box := b.brief(time.Hour)
			old := bornAt(time.Now().Add(-100 * time.Hour))
			exec(t, b.db, `INSERT INTO inbox (slot, consumer, message_id) VALUES (3, 'group', $1), (5, 'group', $1)`, old)
			tx, err := b.db.Begin(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = tx.Rollback(context.Background()) }()
			if _, err := tx.Exec(t.Context(), sql); err != nil {
				t.Fatal(err)
			}
			if slots := sweepOnce(t, box); !slices.Equal(slots, []int16{5}) {
				t.Errorf("swept %v", slots)
			}
			if err := tx.Commit(t.Context()); err != nil {
				t.Fatal(err)
			}
			if slots := sweepOnce(t, box); !slices.Equal(slots, []int16{3}) {
				t.Errorf("swept %v", slots)
			}
		})
	}
}

// A process that was frozen between looking at a message and taking it finds its copies forgotten.
func TestNothingForgottenIsAppliedAgain(t *testing.T) {
	t.Parallel()
	b := setup(t)
	box := b.inbox(Config{})
	forgotten, remembered, fresh := aged(time.Hour, "forgotten"), aged(time.Hour, "remembered"), probe("", "fresh")
	process(t, box, remembered)
	items, letters := box.admit(t.Context(), []messaging.Delivery{forgotten, remembered, fresh})
	if len(items) != 3 || len(letters) != 0 {
		t.Fatalf("admitted %d items and %d letters", len(items), len(letters))
	}
	box.ring = ring{time.Minute} // as time passes
	if err := box.settle(t.Context(), items); err != nil {
		t.Fatal(err)
	}
	b.wantEffects(t, "remembered", "fresh")
	b.wantDead(t, "outside_window 0")
}

// Many turns of the ring, with copies of everything and sweeps in between: no effect is doubled, and in the end nothing is left.
func TestCopiesWhileSlotsAreSwept(t *testing.T) {
	t.Parallel()
	b := setup(t)
	const slot = 200 * time.Millisecond
	box := b.brief(slot)
	ctx, cancel := context.WithCancel(t.Context())
	var sweeping sync.WaitGroup
	var emptied int
	sweeping.Go(func() {
		for ctx.Err() == nil {
			swept, err := box.sweep(ctx)
			if err != nil && ctx.Err() == nil {
				t.Error(err)
			}
			emptied += len(swept)
		}
	})
	for n := range 4 * slots {
		for range 3 {
			var batch []messaging.Delivery
			for i := range 20 {
				batch = append(batch, probe("", fmt.Sprint("m", 20*n+i, uuid.NewString())))
			}
			process(t, box, batch...)
			process(t, box, batch...)
		}
		time.Sleep(time.Until(time.UnixMilli((time.Now().UnixMilli()/slot.Milliseconds() + 1) * slot.Milliseconds()))) // the next slot
	}
	cancel()
	sweeping.Wait()
	if t.Logf("%d slots emptied meanwhile", emptied); emptied == 0 {
		t.Error("nothing was swept beside the traffic")
	}
	var doubled int
	if err := b.db.QueryRow(t.Context(), `SELECT count(*) FROM effects WHERE n > 1`).Scan(&doubled); err != nil || doubled > 0 {
		t.Errorf("%d effects are doubled, %v", doubled, err)
	}
	testenv.Eventually(t, time.Minute, func() error {
		sweepOnce(t, box)
		if n := b.remembered(t); n > 0 {
			return fmt.Errorf("%d messages are still remembered", n)
		}
		return nil
	})
}

// Five turns of the ring, each slot swept at the last moment before it is used again: the size is the same after each turn.
func TestInboxStaysSmall(t *testing.T) {
	t.Parallel()
	b := setup(t)
	ring := ring{time.Hour}
	start := time.Now().Add(-100 * ring.slot).Truncate(ring.slot)
	var size [5]int
	for n := range len(size) * slots {
		now := start.Add(time.Duration(n) * ring.slot)
		oldest := now.Add(-ring.skew() - ring.memory())
		testenv.Eventually(t, time.Minute, func() error { // autovacuum may hold a slot
			var emptied []int16
			if err := b.db.QueryRow(t.Context(), `SELECT inbox_sweep($1)`, time.Since(oldest)).Scan(&emptied); err != nil {
				t.Fatal(err)
			}
			if n >= slots && len(emptied) != 1 {
				return fmt.Errorf("slot %d of the run: emptied %v", n, emptied)
			}
			return nil
		})
		ids := make([]string, 500)
		for i := range ids {
			ids[i] = bornAt(now.Add(time.Duration(i) * ring.slot / time.Duration(len(ids))))
		}
		exec(t, b.db, `INSERT INTO inbox (slot, consumer, message_id) SELECT $1, 'group', unnest($2::uuid[])`, identityOf(ids[0], ring.slot).slot, ids)
		err := b.db.QueryRow(t.Context(), `SELECT sum(pg_total_relation_size(relid)) FROM pg_partition_tree('inbox') WHERE isleaf`).Scan(&size[n/slots])
		if err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("bytes after each turn: %d", size)
	if size[4] > size[0]*11/10 {
		t.Errorf("the inbox grew from %d to %d bytes", size[0], size[4])
	}
}

func TestStatus(t *testing.T) {
	t.Parallel()
	b := setup(t)
	box := b.inbox(Config{RetryBase: time.Hour})
	b.on("first", fails)
	first, second, other := probe("k", "first"), probe("k", "second"), probe("o", "other")
	process(t, box, first, second, other, other)
	process(t, newBundle(b.db, "another").inbox(Config{}), other)
	for name, one := range map[string]struct {
		id   string
		want string
	}{
		"Failed":  {first.ID, "group 1 true 1 probe failed;"},
		"Waiting": {second.ID, "group 1 true 0 waits its turn;"},
		"Applied": {other.ID, "another 1 false 0 ;group 2 false 0 ;"},
		"Unknown": {probe("", "").ID, ""},
	} {
		passages, err := StatusesOf(t.Context(), b.db, one.id)
		if err != nil {
			t.Fatal(err)
		}
		var got string
		for _, p := range passages {
			got += fmt.Sprintf("%s %d %t %d %s;", p.Consumer, p.Copies, p.Waits, p.Attempts, p.LastError)
		}
		if got != one.want {
			t.Errorf("%s: got %q, want %q", name, got, one.want)
		}
	}
	blocked, err := Blocked(t.Context(), b.db, 10)
	if err != nil || len(blocked) != 1 {
		t.Fatalf("blocked: %v, %v", blocked, err)
	}
	if k := blocked[0]; k.Key != "k" || k.Waiting != 2 || k.MessageID != first.ID || k.Attempts != 1 || k.LastError != errProbe.Error() {
		t.Errorf("blocked: %+v", k)
	}
}

// The database's clock was set back by half an hour after retries were put off: they are due within the time that they
// would have been, and no claim of a running handler is broken.
func TestRetriesAreNotPutOffByAClockThatIsSetBack(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.on("late", fails)
	b.on("soon", fails)
	p := b.inbox(Config{RetryBase: time.Minute, RetryMax: 10 * time.Minute})
	process(t, p, probe("late", "late"), probe("soon", "soon"))
	setBack := `UPDATE inbox_retry SET due_at = due_at + interval '30 min' WHERE key = 'late'`
	if _, err := b.db.Exec(t.Context(), setBack); err != nil {
		t.Fatal(err)
	}
	if err := p.hasten(t.Context()); err != nil {
		t.Fatal(err)
	}
	b.on("late", nil)
	if !retryOne(t, p) || retryOne(t, p) {
		t.Error("want one retry: the one that was put off by the clock")
	}
	b.wantEffects(t, "late")
}
