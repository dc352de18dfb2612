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

// inboxWithSlots returns an inbox with slots of the given length.
func (b *bundle) inboxWithSlots(slot time.Duration) *Inbox {
	box := b.inbox(Config{})
	box.ring = ring{slot}
	return box
}

func (b *bundle) countRecords(t testing.TB) (n int) {
	t.Helper()
	if err := b.db.QueryRow(t.Context(), `SELECT count(*) FROM inbox`).Scan(&n); err != nil {
		t.Fatal(err)
	}
	return n
}

// aged returns a delivery of the given age.
func aged(age time.Duration, text string) messaging.Delivery {
	d := probe("", text)
	d.ID = idAt(time.Now().Add(-age))
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
	box := b.inboxWithSlots(time.Hour)
	memory := box.ring.memory()
	if box.ring.window() >= memory || memory+box.ring.skew() >= (slots-1)*box.ring.slot {
		t.Fatalf("window %s, memory %s and skew %s leave no time for a sweep",
			box.ring.window(), memory, box.ring.skew())
	}
	oldest := aged(box.ring.window()-time.Second, "oldest")
	process(t, box, oldest, aged(0, "fresh"))
	if slots := sweepOnce(t, box); len(slots) != 0 {
		t.Fatalf("swept %v", slots)
	}
	process(t, box, oldest) // a copy
	b.wantEffects(t, "oldest", "fresh")
	var copies int
	err := b.db.QueryRow(t.Context(), `SELECT max(copies) FROM inbox`).Scan(&copies)
	if err != nil || copies != 2 {
		t.Errorf("%d copies, %v", copies, err)
	}

	older := aged(memory+time.Second, "older")
	// Age the message.
	exec(t, b.db, `UPDATE inbox SET message_id = $1 WHERE message_id = $2`, older.ID, oldest.ID)
	if slots := sweepOnce(t, box); len(slots) != 1 {
		t.Fatalf("swept %v", slots)
	}
	if n := b.countRecords(t); n != 1 {
		t.Errorf("%d records are left, want 1", n)
	}
	process(t, box, older)
	b.wantEffects(t, "oldest", "fresh")
	b.wantDead(t, "outside_window 0")
}

func TestSweepOfForeignIDs(t *testing.T) {
	t.Parallel()
	b := setup(t)
	box := b.inbox(Config{})
	text, v4 := probe("", "text"), probe("", "v4")
	text.ID, v4.ID = "one", uuid.NewString()
	process(t, box, text, v4)
	exec(t, b.db, `UPDATE inbox SET received_at = clock_timestamp() - interval '8 days'`)
	process(t, box, probe("", "fresh"))
	exec(t, b.db, `
		INSERT INTO inbox (slot, consumer, message_id, received_at)
		SELECT -1, 'group', gen_random_uuid(), clock_timestamp() - interval '8 days' FROM generate_series(1, 25000)`)
	sweepOnce(t, box)
	if n := b.countRecords(t); n != 1 {
		t.Errorf("%d records are left, want 1", n)
	}
}

// A session that has locked a slot, even another sweep, delays the sweep of that slot only.
func TestSweepWaitsForNobody(t *testing.T) {
	t.Parallel()
	for name, sql := range map[string]string{
		"AReader":      `SELECT FROM inbox_slot_3`,
		"AnotherSweep": `LOCK TABLE ONLY inbox_slot_3 IN ACCESS EXCLUSIVE MODE`,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := setup(t)
			box := b.inboxWithSlots(time.Hour)
			old := idAt(time.Now().Add(-100 * time.Hour))
			exec(t, b.db, `INSERT INTO inbox (slot, consumer, message_id) VALUES (3, 'group', $1), (5, 'group', $1)`,
				old)
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

// A process is frozen between admitting a message and taking it; meanwhile the inbox forgets copies of the message.
func TestNothingForgottenIsAppliedAgain(t *testing.T) {
	t.Parallel()
	b := setup(t)
	box := b.inbox(Config{})
	forgotten, known, fresh := aged(time.Hour, "forgotten"), aged(time.Hour, "known"), probe("", "fresh")
	process(t, box, known)
	items, letters := box.admit(t.Context(), []messaging.Delivery{forgotten, known, fresh})
	if len(items) != 3 || len(letters) != 0 {
		t.Fatalf("admitted %d items and %d dead letters", len(items), len(letters))
	}
	box.ring = ring{time.Minute} // shrink the window, as if time had passed
	if err := box.settle(t.Context(), items); err != nil {
		t.Fatal(err)
	}
	b.wantEffects(t, "known", "fresh")
	b.wantDead(t, "outside_window 0")
}

// During many turns of the ring, with copies of every message and concurrent sweeps, no effect is doubled. In the end
// no record is left.
func TestCopiesWhileSlotsAreSwept(t *testing.T) {
	t.Parallel()
	b := setup(t)
	const slot = 200 * time.Millisecond
	box := b.inboxWithSlots(slot)
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
		nextSlot := (time.Now().UnixMilli()/slot.Milliseconds() + 1) * slot.Milliseconds()
		time.Sleep(time.Until(time.UnixMilli(nextSlot)))
	}
	cancel()
	sweeping.Wait()
	if t.Logf("%d slots truncated meanwhile", emptied); emptied == 0 {
		t.Error("no slot was swept during the traffic")
	}
	var doubled int
	err := b.db.QueryRow(t.Context(), `SELECT count(*) FROM effects WHERE n > 1`).Scan(&doubled)
	if err != nil || doubled > 0 {
		t.Errorf("%d effects are doubled, %v", doubled, err)
	}
	testenv.Eventually(t, time.Minute, func() error {
		sweepOnce(t, box)
		if n := b.countRecords(t); n > 0 {
			return fmt.Errorf("%d records are left", n)
		}
		return nil
	})
}

// During five turns of the ring, each slot is swept at the last moment before it is reused. The size is the same after
// each turn.
func TestInboxStaysSmall(t *testing.T) {
	t.Parallel()
	b := setup(t)
	ring := ring{time.Hour}
	start := time.Now().Add(-100 * ring.slot).Truncate(ring.slot)
	var size [5]int
	for n := range len(size) * slots {
		now := start.Add(time.Duration(n) * ring.slot)
		oldest := now.Add(-ring.skew() - ring.memory())
		testenv.Eventually(t, time.Minute, func() error { // autovacuum may have locked a slot
			var emptied []int16
			err := b.db.QueryRow(t.Context(), `SELECT inbox_sweep($1)`, time.Since(oldest)).Scan(&emptied)
			if err != nil {
				t.Fatal(err)
			}
			if n >= slots && len(emptied) != 1 {
				return fmt.Errorf("slot %d of the run: truncated %v", n, emptied)
			}
			return nil
		})
		ids := make([]string, 500)
		for i := range ids {
			ids[i] = idAt(now.Add(time.Duration(i) * ring.slot / time.Duration(len(ids))))
		}
		exec(t, b.db, `INSERT INTO inbox (slot, consumer, message_id) SELECT $1, 'group', unnest($2::uuid[])`,
			identityOf(ids[0], ring.slot).slot, ids)
		err := b.db.QueryRow(t.Context(), `
			SELECT sum(pg_total_relation_size(relid)) FROM pg_partition_tree('inbox') WHERE isleaf`).
			Scan(&size[n/slots])
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
	for name, test := range map[string]struct {
		id   string
		want string
	}{
		"Failed":  {first.ID, "group 1 true 1 probe failed;"},
		"Waiting": {second.ID, "group 1 true 0 waiting for its turn;"},
		"Applied": {other.ID, "another 1 false 0 ;group 2 false 0 ;"},
		"Unknown": {probe("", "").ID, ""},
	} {
		statuses, err := StatusesOf(t.Context(), b.db, test.id)
		if err != nil {
			t.Fatal(err)
		}
		var got string
		for _, s := range statuses {
			got += fmt.Sprintf("%s %d %t %d %s;", s.Consumer, s.Copies, s.Waits, s.Attempts, s.LastError)
		}
		if got != test.want {
			t.Errorf("%s: got %q, want %q", name, got, test.want)
		}
	}
	blocked, err := Blocked(t.Context(), b.db, 10)
	if err != nil || len(blocked) != 1 {
		t.Fatalf("blocked: %v, %v", blocked, err)
	}
	k := blocked[0]
	if k.Key != "k" || k.Waiting != 2 || k.MessageID != first.ID || k.Attempts != 1 || k.LastError != errProbe.Error() {
		t.Errorf("blocked: %+v", k)
	}
}

// After the database's clock was set back by half an hour, a retry whose due time is too far ahead becomes due, and
// other retries keep their due times.
func TestAClockThatIsSetBackDoesNotPostponeRetries(t *testing.T) {
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
		t.Error("want one retry, of the message whose due time was too far ahead")
	}
	b.wantEffects(t, "late")
}
