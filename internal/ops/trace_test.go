package ops

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"example.com/shop/internal/deadletter"
	"example.com/shop/internal/inbox"
	"example.com/shop/internal/messaging"
	"example.com/shop/internal/outbox"
	"example.com/shop/internal/postgres"
	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// insert inserts a message into the log, and returns it as it will be delivered.
func (f *fixture) insert(t testing.TB, key, text string) messaging.Delivery {
	t.Helper()
	message := messaging.New(key, wrapperspb.String(text))
	err := postgres.Transact(t.Context(), f.Pool, func(tx pgx.Tx) error {
		return outbox.Insert(t.Context(), tx, message)
	})
	if err != nil {
		t.Fatal(err)
	}
	return messaging.Delivery{ID: message.ID.String(), Type: message.Type, Key: key, Payload: message.Payload}
}

// delivered records everything in the log as published.
func (f *fixture) delivered(t testing.TB) {
	t.Helper()
	f.exec(t, `UPDATE outbox_cursor SET delivered = pg_current_snapshot()`)
}

// steps returns the steps of a message as text, without times and numbers that a test cannot know.
func (f *fixture) steps(t testing.TB, id string) (steps []string) {
	t.Helper()
	trace, err := Trace(t.Context(), f.Pool, id)
	if err != nil || !trace.Known() {
		t.Fatalf("known %t, %v", trace.Known(), err)
	}
	groups := []Group{
		{Name: "group", Types: f.types()}, {Name: "other", Types: f.types()}, {Name: "third", Types: []string{"type"}},
	}
	for _, step := range trace.Steps(groups) {
		what, _, _ := strings.Cut(step.What, " by transaction")
		what, _, _ = strings.Cut(what, ", due")
		when := "now"
		if step.At != nil {
			when = "at"
		}
		steps = append(steps, fmt.Sprintf("%s %s: %s", when, step.Where, what))
	}
	return steps
}

func (f *fixture) types() []string { return []string{delivery("", "").Type} }

func TestStepsOfAMessage(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	m := f.insert(t, "k", "m")
	start := []string{"at outbox: inserted"}
	wantSteps := func(name string, more ...string) {
		t.Helper()
		equal(t, name, f.steps(t, m.ID), append(slices.Clone(start), more...)...)
	}
	wantSteps("inserted", "now relay: waits to be published")
	f.delivered(t)
	start = append(start, "now relay: published")
	wantSteps("published", "now group: has not received it", "now other: has not received it")
	f.process(t, m, m, m)
	end := "now other: has not received it"
	wantSteps("applied", "at group: received", "now group: applied; 3 copies arrived, 2 absorbed", end)

	m = f.insert(t, "k", "fails")
	f.delivered(t)
	f.fail(t, m)
	start = append(start, "at group: received", "at group: dead letter 1, permanent after 1 attempt: broken")
	wantSteps("dead", "now group: dead letter 1 is open", end)
	f.redrive(t, all)
	start = append(start, "at group: dead letter 1 redriven by ann: fixed")
	wantSteps("redriven", "now group: waits for its turn", end)
	f.retry(t)
	wantSteps("applied at last", "now group: applied", end)

	f.exec(t, `
		INSERT INTO inbox_retry (consumer, message_id, type, key, payload, headers, attempts, due_at, last_error)
		VALUES ('group', $1, 't', 'k', '', '{}', 2, now(), 'still broken')`, m.ID)
	wantSteps("waits for a retry", "now group: waits for a retry", end)

	f.exec(t, `UPDATE outbox SET type = 'nobodys.v1.Event' WHERE message_id = $1`, m.ID)
	if steps := f.steps(t, m.ID); !slices.Contains(steps,
		"now relay: published; no group of this service handles nobodys.v1.Event") {
		t.Errorf("a message that no group handles: %q", steps)
	}
}

// A dead letter of the relay replaces the publishing. A dead letter for an undelivered message says nothing about the
// effect.
func TestStepsOfOtherLetters(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	m := f.insert(t, "k", "m")
	f.delivered(t)
	err := postgres.Transact(t.Context(), f.Pool, func(tx pgx.Tx) error {
		return deadletter.Insert(t.Context(), tx, deadletter.Letter{
			MessageID: m.ID, Type: m.Type, Reason: deadletter.Unroutable, Error: "312", Attempts: 1,
		})
	})
	if err != nil {
		t.Fatal(err)
	}
	f.process(t, m)
	f.drain(t, m)
	equal(t, "steps", f.steps(t, m.ID), "at outbox: inserted",
		"at relay: dead letter 1, unroutable after 1 attempt: 312", "at group: received",
		"now group: applied", "at group: dead letter 2, undelivered after 0 attempts: the broker gave it up: ",
		"now relay: dead letter 1 is open", "now group: dead letter 2 is open", "now other: has not received it")
}

// A scheduled message is traced by the ID that its writer knows, before and after it enters the log under another one.
func TestStepsOfAScheduledMessage(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	message := messaging.New("k", wrapperspb.String("m"))
	copy(message.ID[:6], make([]byte, 6)) // scheduled long ago
	message.ID[0] = 1
	err := postgres.Transact(t.Context(), f.Pool, func(tx pgx.Tx) error {
		return outbox.Schedule(t.Context(), tx, time.Now(), message)
	})
	if err != nil {
		t.Fatal(err)
	}
	f.insert(t, "k", "another message")
	equal(t, "waiting", f.steps(t, message.ID.String()), "at outbox: scheduled", "now outbox: waits for its time")

	f.exec(t, `SELECT outbox_move_due(10)`)
	f.delivered(t)
	trace, err := Trace(t.Context(), f.Pool, message.ID.String())
	if err != nil || trace.ScheduledID != message.ID.String() || trace.MessageID == trace.ScheduledID {
		t.Fatalf("%+v, %v", trace, err)
	}
	m := messaging.Delivery{ID: trace.MessageID, Type: message.Type, Key: "k", Payload: message.Payload}
	f.fail(t, m)
	want := []string{"at outbox: inserted", "now relay: published", "at group: received",
		"at group: dead letter 1, permanent after 1 attempt: broken", "now group: dead letter 1 is open",
		"now other: has not received it"}
	equal(t, "by the published ID", f.steps(t, m.ID), want...)
	want = append([]string{"at outbox: scheduled as " + message.ID.String()}, want...)
	equal(t, "by the scheduled ID", f.steps(t, message.ID.String()), want...)

	f.exec(t, `TRUNCATE outbox`)
	equal(t, "after the retention", f.steps(t, message.ID.String())[:2], want[0], want[3])
}

func TestCheckRetention(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	const kept = 5 * 8
	for hours, want := range map[int]string{0: "5d5h", 24: "4d5h", 165 - kept - 1: "1h"} {
		detail, err := CheckRetention(t.Context(), f.Pool, hour(hours))
		if err != nil || !strings.HasSuffix(detail, "be away for "+want) {
			t.Errorf("%d hours: %q, %v", hours, detail, err)
		}
	}
	detail, err := CheckRetention(t.Context(), f.Pool, inbox.Retention-hour(kept))
	if err == nil || !strings.Contains(err.Error(), "1d16h") {
		t.Errorf("equal: %q, %v", detail, err)
	}
}

// A dead letter that is selected by its ID but is not open is reported as an outcome.
func TestDeadLettersThatAreNotOpen(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	f.fail(t, delivery("", "a"), delivery("", "b"))
	some := all
	some.Filter.IDs = []int64{1, 77}
	notOpen := "refused: " + errNotOpen.Error()
	equal(t, "outcomes", f.redrive(t, some), "redriven", notOpen)
	equal(t, "outcomes of another redrive", f.redrive(t, some), notOpen, notOpen)
	if trace, err := Trace(t.Context(), f.Pool, uuid.NewString()); err != nil || trace.Known() {
		t.Errorf("an unknown message: %+v, %v", trace, err)
	}
}
