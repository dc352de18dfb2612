package inbox

import (
	"math"
	"testing"
	"time"

	"pgregory.net/rapid"
)

func TestBackoffDoubles(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.on("bad", fails)
	p := b.inbox(Config{MaxAttempts: 6, RetryBase: time.Hour, RetryMax: 8 * time.Hour})
	process(t, p, probe("", "bad"))
	for _, want := range []time.Duration{time.Hour, 2 * time.Hour, 4 * time.Hour, 8 * time.Hour, 8 * time.Hour} {
		if retryOne(t, p) {
			t.Fatal("retried before it was due")
		}
		var pause time.Duration
		if err := b.db.QueryRow(t.Context(),
			`SELECT due_at - clock_timestamp() FROM inbox_retry`).Scan(&pause); err != nil {
			t.Fatal(err)
		}
		// A minute for a slow test between writing and reading.
		if pause < want*3/4-time.Minute || pause > want*5/4 {
			t.Errorf("pause is %s, want %s plus or minus a quarter", pause, want)
		}
		b.makeDue(t)
		if !retryOne(t, p) {
			t.Fatal("not retried when due")
		}
	}
	b.wantDead(t, "exhausted 6")
	b.wantWaiting(t)
}

func TestPauseIsBounded(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		base := time.Duration(rapid.Int64Range(1, int64(365*24*time.Hour)).Draw(t, "base"))
		longest := time.Duration(rapid.Int64Range(1, int64(365*24*time.Hour)).Draw(t, "longest"))
		attempts := rapid.OneOf(rapid.IntRange(1, 70), rapid.IntRange(1, 1<<30)).Draw(t, "attempts")
		p := New(nil, NewGroup("group"), Config{RetryBase: base, RetryMax: longest})
		want := min(float64(base)*math.Exp2(float64(attempts-1)), float64(longest))
		if pause := float64(p.pause(attempts)); pause < want*0.7499-1 || pause > want*1.2501+1 {
			t.Fatalf("pause %g after %d attempts, want %g plus or minus a quarter", pause, attempts, want)
		}
	})
}

func TestPausesDiffer(t *testing.T) {
	t.Parallel()
	p, seen := New(nil, NewGroup("group"), Config{}), map[time.Duration]bool{}
	for range 100 {
		seen[p.pause(5)] = true
	}
	if len(seen) < 90 {
		t.Errorf("100 messages that failed together are retried at only %d different times", len(seen))
	}
}
