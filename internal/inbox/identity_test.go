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

// bornAt makes a UUIDv7 of a time, in its full resolution of a millisecond.
func bornAt(at time.Time) string {
	id := uuid.Must(uuid.NewV7())
	var millis [8]byte
	binary.BigEndian.PutUint64(millis[:], uint64(at.UnixMilli()))
	copy(id[:6], millis[2:])
	return id.String()
}

func TestIdentify(t *testing.T) {
	t.Parallel()
	now := time.Date(2026, 3, 10, 23, 59, 59, 0, time.UTC)

	t.Run("RefusesOutsideOfTheWindow", func(t *testing.T) {
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
			who, err := days.identify(bornAt(now.Add(-age)), now)
			if err == nil {
				err = days.judge(who, now)
			}
			if got := reasonOf(err); got != reason {
				t.Errorf("age %s: got %v, want %q", age, err, reason)
			}
		}
		if _, err := days.identify("ffffffff-ffff-7fff-bfff-ffffffffffff", now); reasonOf(err) != deadletter.OutsideWindow {
			t.Errorf("largest time: got %v", err)
		}
	})

	// The process's own clock may be wrong, and decides only what would do harm if it were taken.
	t.Run("LetsTheDatabaseDecide", func(t *testing.T) {
		t.Parallel()
		for age, reason := range map[time.Duration]deadletter.Reason{
			20 * 365 * 24 * time.Hour:         "",
			-2 * days.skew():                  "",
			-2*days.skew() - time.Millisecond: deadletter.OutsideWindow,
		} {
			if _, err := days.identify(bornAt(now.Add(-age)), now); reasonOf(err) != reason {
				t.Errorf("age %s: got %v, want %q", age, err, reason)
			}
		}
	})

	t.Run("RefusesNoID", func(t *testing.T) {
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
		notRFC[8] = 0xff // the variant "reserved for the future": what looks like a version is none
		for _, id := range []string{"1", "2", " 1", "order-1", uuid.NewString(), uuid.Must(uuid.NewV6()).String(), uuid.Nil.String(),
			notRFC.String(), v7.String() + "x", strings.Repeat("x", 255), "日本"} {
			got, err := days.identify(id, now)
			if err != nil || got.slot != foreignSlot || got.id.Version() != 8 {
				t.Errorf("%q: got %+v, %v", id, got, err)
			}
			if other, taken := seen[got.id]; taken {
				t.Errorf("%q and %q are taken for one", id, other)
			}
			seen[got.id] = id
		}
	})

	t.Run("DoesNotCareHowAUUIDIsSpelled", func(t *testing.T) {
		t.Parallel()
		id := bornAt(now)
		want, _ := days.identify(id, now)
		for _, spelled := range []string{strings.ToUpper(id), "urn:uuid:" + id, "{" + id + "}", strings.ReplaceAll(id, "-", "")} {
			if got, err := days.identify(spelled, now); got != want || err != nil {
				t.Errorf("%q: got %+v, %v, want %+v", spelled, got, err, want)
			}
		}
	})

	// All copies of a message must meet in one slot whenever they come, and no slot may hold what is younger than the window
	// by the time its turn comes again.
	t.Run("SlotFollowsFromTheIDAlone", rapid.MakeCheck(func(t *rapid.T) {
		born := now.Add(time.Duration(rapid.Int64Range(0, int64(30*24*time.Hour)).Draw(t, "born")))
		first := time.Duration(rapid.Int64Range(-int64(days.skew()), int64(days.window())).Draw(t, "first"))
		second := time.Duration(rapid.Int64Range(-int64(days.skew()), int64(days.window())).Draw(t, "second"))
		id := bornAt(born)
		born = born.Truncate(time.Millisecond)
		one, err := days.identify(id, born.Add(first))
		if err != nil {
			t.Fatal(err)
		}
		two, err := days.identify(id, born.Add(second))
		if err != nil || one != two {
			t.Fatalf("came to %+v and %+v, %v", one, two, err)
		}
		if one.slot < 0 || one.slot >= slots {
			t.Fatalf("slot %d has no partition", one.slot)
		}
		next, err := days.identify(bornAt(born.Add(slotLength)), born.Add(slotLength))
		if err != nil || next.slot != (one.slot+1)%slots {
			t.Fatalf("a day after slot %d comes slot %d, %v", one.slot, next.slot, err)
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

// Of two consumers one has a clock that is wrong. What the outbox has accepted by the database's clock, both apply.
func TestAConsumersWrongClockRefusesNothing(t *testing.T) {
	t.Parallel()
	for _, by := range []time.Duration{-3 * time.Hour, -11 * time.Minute, 11 * time.Minute, 3 * time.Hour} {
		t.Run(by.String(), func(t *testing.T) {
			t.Parallel()
			b := setup(t)
			testenv.ShiftClock(t, b.db, by)
			m := probe("k", "good")
			m.ID = bornAt(time.Now().Add(by))
			process(t, b.inbox(Config{}), m, m)
			b.wantEffects(t, "good")
			b.wantDead(t)
		})
	}
}

// The outbox lets in what is ten minutes ahead; then the database's clock is set back by half an hour.
func TestAClockThatIsSetBackRefusesNothing(t *testing.T) {
	t.Parallel()
	b := setup(t)
	m := probe("k", "good")
	m.ID = bornAt(time.Now().Add(40 * time.Minute))
	process(t, b.inbox(Config{}), m, m)
	b.wantEffects(t, "good")
	b.wantDead(t)
}

// Consumers take every message that the outbox accepts, with time to spare for what comes in between.
func TestWhatTheOutboxAcceptsConsumersTake(t *testing.T) {
	t.Parallel()
	b := setup(t)
	var ahead, oldest time.Duration
	if err := b.db.QueryRow(t.Context(), `SELECT outbox_most_ahead(), outbox_oldest()`).Scan(&ahead, &oldest); err != nil {
		t.Fatal(err)
	}
	if days.skew() < ahead+time.Hour || days.window() < oldest+12*time.Hour {
		t.Errorf("the outbox accepts what is %s ahead to %s old, consumers %s to %s", ahead, oldest, days.skew(), days.window())
	}
}

func TestOutsideTheWindowNothingIsApplied(t *testing.T) {
	t.Parallel()
	for name, at := range map[string]time.Duration{
		"TooOld": -days.window() - time.Second, "FromTheFuture": days.skew() + time.Minute, "FromFarAhead": 3 * days.skew(),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := setup(t)
			b.on("bad", fails)
			stray, good := probe("k", "stray"), probe("k", "good")
			stray.ID = bornAt(time.Now().Add(at))
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
	old.ID = bornAt(time.Now().Add(-days.window() + time.Minute))
	ahead.ID = bornAt(time.Now().Add(days.skew() - time.Minute))
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
	b.wantDead(t, "no_id 0", "no_id 0") // and not taken for copies of each other
}
