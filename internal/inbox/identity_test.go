package inbox

import (
	"encoding/binary"
	"errors"
	"strings"
	"testing"
	"time"

	"example.com/shop/internal/deadletter"
	"example.com/shop/internal/dev/testenv"
	"github.com/google/uuid"
	"pgregory.net/rapid"
)

// idAt returns a UUIDv7 with the given time, to the millisecond.
func idAt(at time.Time) string {
	id := uuid.Must(uuid.NewV7())
	var millis [8]byte
	binary.BigEndian.PutUint64(millis[:], uint64(at.UnixMilli()))
	copy(id[:6], millis[2:])
	return id.String()
}

func TestIdentify(t *testing.T) {
	t.Parallel()
	now := time.Date(2026, 3, 10, 23, 59, 59, 0, time.UTC)

	t.Run("RefusesOutsideTheWindow", func(t *testing.T) {
		t.Parallel()
		for age, reason := range map[time.Duration]deadletter.Reason{
			0:                                "",
			days.window():                    "",
			days.window() + time.Millisecond: deadletter.OutsideWindow,
			20 * 365 * 24 * time.Hour:        deadletter.OutsideWindow,
			-days.skew():                     "",
			-days.skew() - time.Millisecond:  deadletter.OutsideWindow,
			-200 * 365 * 24 * time.Hour:      deadletter.OutsideWindow,
			now.Sub(time.UnixMilli(0)):       deadletter.OutsideWindow,
			now.Sub(time.UnixMilli(1 << 40)): deadletter.OutsideWindow,
		} {
			id, err := days.identify(idAt(now.Add(-age)), now)
			if err == nil {
				err = days.judge(id, now)
			}
			if got := reasonOf(err); got != reason {
				t.Errorf("age %s: got %v, want %q", age, err, reason)
			}
		}
		_, err := days.identify("ffffffff-ffff-7fff-bfff-ffffffffffff", now)
		if reasonOf(err) != deadletter.OutsideWindow {
			t.Errorf("largest time: got %v", err)
		}
	})

	// The process's own clock may be wrong, so it refuses only messages that would do harm if they were taken.
	t.Run("LetsTheDatabaseDecide", func(t *testing.T) {
		t.Parallel()
		for age, reason := range map[time.Duration]deadletter.Reason{
			20 * 365 * 24 * time.Hour:         "",
			-2 * days.skew():                  "",
			-2*days.skew() - time.Millisecond: deadletter.OutsideWindow,
		} {
			if _, err := days.identify(idAt(now.Add(-age)), now); reasonOf(err) != reason {
				t.Errorf("age %s: got %v, want %q", age, err, reason)
			}
		}
	})

	t.Run("RefusesAMissingID", func(t *testing.T) {
		t.Parallel()
		if _, err := days.identify("", now); reasonOf(err) != deadletter.NoID {
			t.Errorf("got %v", err)
		}
	})

	t.Run("GivesForeignIDsASlotOfTheirOwn", func(t *testing.T) {
		t.Parallel()
		seen := map[uuid.UUID]string{}
		v7 := uuid.Must(uuid.NewV7())
		notRFC := v7
		notRFC[8] = 0xff // the variant "reserved for the future", which has no version
		for _, id := range []string{
			"1", "2", " 1", "order-1", uuid.NewString(), uuid.Must(uuid.NewV6()).String(), uuid.Nil.String(),
			notRFC.String(), v7.String() + "x", strings.Repeat("x", 255), "日本",
		} {
			got, err := days.identify(id, now)
			if err != nil || got.slot != foreignSlot || got.id.Version() != 8 {
				t.Errorf("%q: got %+v, %v", id, got, err)
			}
			if other, taken := seen[got.id]; taken {
				t.Errorf("%q and %q have the same identity", id, other)
			}
			seen[got.id] = id
		}
	})

	t.Run("IgnoresTheSpellingOfAUUID", func(t *testing.T) {
		t.Parallel()
		id := idAt(now)
		want, _ := days.identify(id, now)
		for _, spelled := range []string{
			strings.ToUpper(id), "urn:uuid:" + id, "{" + id + "}", strings.ReplaceAll(id, "-", ""),
		} {
			if got, err := days.identify(spelled, now); got != want || err != nil {
				t.Errorf("%q: got %+v, %v, want %+v", spelled, got, err, want)
			}
		}
	})

	// All copies of a message must meet in the same slot, whenever they arrive, and a slot must contain no message within
	// the window when its next turn begins.
	t.Run("SlotFollowsFromTheIDAlone", rapid.MakeCheck(func(t *rapid.T) {
		created := now.Add(time.Duration(rapid.Int64Range(0, int64(30*24*time.Hour)).Draw(t, "created")))
		first := time.Duration(rapid.Int64Range(-int64(days.skew()), int64(days.window())).Draw(t, "first"))
		second := time.Duration(rapid.Int64Range(-int64(days.skew()), int64(days.window())).Draw(t, "second"))
		id := idAt(created)
		created = created.Truncate(time.Millisecond)
		original, err := days.identify(id, created.Add(first))
		if err != nil {
			t.Fatal(err)
		}
		copied, err := days.identify(id, created.Add(second))
		if err != nil || original != copied {
			t.Fatalf("identities are %+v and %+v, %v", original, copied, err)
		}
		if original.slot < 0 || original.slot >= slots {
			t.Fatalf("slot %d has no partition", original.slot)
		}
		next, err := days.identify(idAt(created.Add(slotLength)), created.Add(slotLength))
		if err != nil || next.slot != (original.slot+1)%slots {
			t.Fatalf("a day after slot %d comes slot %d, %v", original.slot, next.slot, err)
		}
	}))
}

func reasonOf(err error) deadletter.Reason {
	var rejected *rejection
	if errors.As(err, &rejected) {
		return rejected.reason
	}
	return ""
}

// A consumer whose clock is wrong applies every message that the outbox accepted by the database's clock.
func TestAConsumersWrongClockRefusesNothing(t *testing.T) {
	t.Parallel()
	for _, by := range []time.Duration{-3 * time.Hour, -11 * time.Minute, 11 * time.Minute, 3 * time.Hour} {
		t.Run(by.String(), func(t *testing.T) {
			t.Parallel()
			b := setup(t)
			testenv.ShiftClock(t, b.db, by)
			m := probe("k", "good")
			m.ID = idAt(time.Now().Add(by))
			process(t, b.inbox(Config{}), m, m)
			b.wantEffects(t, "good")
			b.wantDead(t)
		})
	}
}

// The outbox accepts a message that is ten minutes ahead; then the database's clock is set back by half an hour.
func TestAClockThatIsSetBackRefusesNothing(t *testing.T) {
	t.Parallel()
	b := setup(t)
	m := probe("k", "good")
	m.ID = idAt(time.Now().Add(40 * time.Minute))
	process(t, b.inbox(Config{}), m, m)
	b.wantEffects(t, "good")
	b.wantDead(t)
}

// Consumers take every message that the outbox accepts, with a margin for the time in flight.
func TestWhatTheOutboxAcceptsConsumersTake(t *testing.T) {
	t.Parallel()
	b := setup(t)
	var ahead, oldest time.Duration
	const sql = `SELECT outbox_most_ahead(), outbox_oldest()`
	if err := b.db.QueryRow(t.Context(), sql).Scan(&ahead, &oldest); err != nil {
		t.Fatal(err)
	}
	if days.skew() < ahead+time.Hour || days.window() < oldest+12*time.Hour {
		t.Errorf("the outbox accepts messages from %s ahead to %s old, consumers from %s to %s",
			ahead, oldest, days.skew(), days.window())
	}
}

func TestOutsideTheWindowNothingIsApplied(t *testing.T) {
	t.Parallel()
	for name, at := range map[string]time.Duration{
		"TooOld":        -days.window() - time.Second,
		"FromTheFuture": days.skew() + time.Minute,
		"FromFarAhead":  3 * days.skew(),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := setup(t)
			b.on("bad", fails)
			stray, good := probe("k", "stray"), probe("k", "good")
			stray.ID = idAt(time.Now().Add(at))
			process(t, b.inbox(Config{}), stray, good)
			b.wantEffects(t, "good")
			b.wantKept(t, deadletter.OutsideWindow, stray.Payload)
			b.wantWaiting(t)
			if ran := b.ran("stray"); ran != 0 {
				t.Errorf("the handler ran %d times", ran)
			}
		})
	}
}

func TestEdgesOfTheWindowAreDeduplicated(t *testing.T) {
	t.Parallel()
	b := setup(t)
	old, ahead := probe("", "old"), probe("", "ahead")
	old.ID = idAt(time.Now().Add(-days.window() + time.Minute))
	ahead.ID = idAt(time.Now().Add(days.skew() - time.Minute))
	for range 3 {
		process(t, b.inbox(Config{}), old, ahead)
	}
	b.wantEffects(t, "old", "ahead")
	b.wantDead(t)
	b.wantCopies(t, old, 3)
	b.wantCopies(t, ahead, 3)
}

func TestForeignIDsAreDeduplicated(t *testing.T) {
	t.Parallel()
	b := setup(t)
	text, v4 := probe("", "text"), probe("", "v4")
	text.ID, v4.ID = "order 1, attempt 2", uuid.NewString()
	for range 2 {
		process(t, b.inbox(Config{}), text, v4, text)
	}
	b.wantEffects(t, "text", "v4")
	b.wantCopies(t, text, 4)
	b.wantCopies(t, v4, 2)
}

func TestWithoutIDNothingIsApplied(t *testing.T) {
	t.Parallel()
	b := setup(t)
	nameless := probe("k", "nameless")
	nameless.ID = ""
	other := probe("k", "other")
	other.ID = ""
	process(t, b.inbox(Config{}), nameless, other, probe("k", "good"))
	b.wantEffects(t, "good")
	b.wantDead(t, "no_id 0", "no_id 0") // they do not count as copies of each other
}
