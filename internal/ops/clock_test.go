package ops

import (
	"errors"
	"strings"
	"testing"
	"time"

	"example.com/shop/internal/dev/testenv"
	"example.com/shop/internal/outbox"
)

func TestCheckClock(t *testing.T) {
	t.Parallel()
	for shift, wrong := range map[time.Duration]bool{
		0: false, 4 * time.Minute: false, -4 * time.Minute: false, 6 * time.Minute: true, -6 * time.Minute: true,
	} {
		t.Run(shift.String(), func(t *testing.T) {
			t.Parallel()
			db := testenv.Postgres(t)
			testenv.ShiftClock(t, db, shift)
			if err := CheckClock(t.Context(), db); errors.Is(err, outbox.ErrClock) != wrong {
				t.Errorf("error is %v", err)
			}
		})
	}
}

// If the clock of a database was set back half an hour, its rows seem to come from the future.
func TestClockThatWasSetBackIsNoticed(t *testing.T) {
	t.Parallel()
	db := testenv.Postgres(t)
	f := &fixture{Pool: db}
	f.insert(t, "", "m")
	f.exec(t, `UPDATE outbox_cursor
		SET moved_at = clock_timestamp(), lease = '1 h', lease_expires_at = clock_timestamp() + interval '1 h'`)
	if _, err := outbox.Measure(t.Context(), db, 0); err != nil {
		t.Fatal(err)
	}
	ahead := func() string {
		found, err := outboxAhead(t.Context(), db, 5*time.Second)
		if err != nil {
			t.Fatal(err)
		}
		return strings.Join(found, "; ")
	}
	if found := ahead(); found != "" {
		t.Errorf("ahead: %s", found)
	}
	f.exec(t, `UPDATE outbox SET created_at = created_at + interval '30 min'`)
	f.exec(t, `UPDATE outbox_cursor SET lease_expires_at = lease_expires_at + interval '30 min',
		moved_at = moved_at + interval '30 min'`)
	f.exec(t, `UPDATE outbox_backlog SET measured_at = measured_at + interval '30 min',
		oldest_at = oldest_at + interval '30 min'`)
	for _, name := range []string{
		"last move of shard 0", "lease of shard 0", "count of shard 0",
		"oldest message of shard 0", "newest message of shard 0",
	} {
		if found := ahead(); !strings.Contains(found, name+" is 00:2") {
			t.Errorf("%s is not named: %s", name, found)
		}
	}
	shards, err := Shards(t.Context(), db)
	if err != nil || shards[0].Lag < 0 {
		t.Errorf("%+v, %v", shards, err)
	}
}
