package ops

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"example.com/shop/internal/deadletter"
	"example.com/shop/internal/inbox"
	"example.com/shop/internal/messaging"
	"example.com/shop/internal/outbox"
	"example.com/shop/internal/postgres"
	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// insert puts a message into the log, and returns it as it will be delivered.
func (d *desk) insert(t testing.TB, key, text string) messaging.Delivery {
	t.Helper()
	message := messaging.New(key, wrapperspb.String(text))
	err := postgres.Transact(t.Context(), d.Pool,
		func(tx pgx.Tx) error { return outbox.Insert(t.Context(), tx, message) })
	if err != nil {
		t.Fatal(err)
	}
	return messaging.Delivery{ID: message.ID.String(), Type: message.Type, Key: key, Payload: message.Payload}
}

// delivered records all that is in the log as published.
func (d *desk) delivered(t testing.TB) {
	t.Helper()
	d.exec(t, `UPDATE outbox_cursor SET delivered = pg_current_snapshot()`)
}

// steps returns the journey as text, without times and numbers that no test knows.
func (d *desk) steps(t testing.TB, id string) (steps []string) {
	t.Helper()
	journey, err := Trace(t.Context(), d.Pool, id)
	if err != nil || !journey.Known() {
		t.Fatalf("known %t, %v", journey.Known(), err)
	}
	for _, step := range journey.Steps([]Group{{"group", d.types()}, {"other", d.types()},
		{"third", []string{"type"}}}) {
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

func (d *desk) types() []string { return []string{delivery("", "").Type} }

func TestStepsOfAJourney(t *testing.T) {
	t.Parallel()
	d := newDesk(t)
	m := d.insert(t, "k", "m")
	equal(t, "inserted", d.steps(t, m.ID), "at outbox: inserted", "now relay: waits to be published")
	d.delivered(t)
	start := []string{"at outbox: inserted", "now relay: published"}
	equal(t, "published", d.steps(t, m.ID), append(slices.Clone(start), "now group: has not received it",
		"now other: has not received it")...)
	d.process(t, m, m, m)
	end := "now other: has not received it"
	equal(t, "applied", d.steps(t, m.ID), append(slices.Clone(start), "at group: received",
		"now group: applied; 3 copies came, 2 absorbed", end)...)

	m = d.insert(t, "k", "fails")
	d.delivered(t)
	d.fail(t, m)
	start = append(start, "at group: received", "at group: dead letter 1, permanent after 1 attempt: broken")
	equal(t, "dead", d.steps(t, m.ID), append(slices.Clone(start), "now group: dead letter 1 is open", end)...)
	d.redrive(t, order)
	start = append(start, "at group: dead letter 1 redriven by ann: mended")
	equal(t, "redriven", d.steps(t, m.ID), append(slices.Clone(start), "now group: waits for its turn", end)...)
	d.retry(t)
	equal(t, "applied in the end", d.steps(t, m.ID), append(slices.Clone(start), "now group: applied", end)...)

	d.exec(t, `INSERT INTO inbox_retry (consumer, message_id, type, key, payload, headers, attempts, due_at, last_error)
		VALUES ('group', $1, 't', 'k', '', '{}', 2, now(), 'still broken')`, m.ID)
	equal(t, "waits for a retry", d.steps(t, m.ID), append(slices.Clone(start), "now group: waits for a retry", end)...)
}

// A letter of the relay takes the place of being published; what the broker gave up says nothing about the effect.
func TestStepsOfOtherLetters(t *testing.T) {
	t.Parallel()
	d := newDesk(t)
	m := d.insert(t, "k", "m")
	d.delivered(t)
	err := postgres.Transact(t.Context(), d.Pool, func(tx pgx.Tx) error {
		return deadletter.Insert(t.Context(), tx, deadletter.Letter{MessageID: m.ID, Type: m.Type,
			Reason: deadletter.Unroutable, Error: "312", Attempts: 1})
	})
	if err != nil {
		t.Fatal(err)
	}
	d.process(t, m)
	d.drain(t, m)
	equal(t, "steps", d.steps(t, m.ID), "at outbox: inserted",
		"at relay: dead letter 1, unroutable after 1 attempt: 312", "at group: received",
		"now group: applied", "at group: dead letter 2, undelivered after 0 attempts: the broker gave it up: ",
		"now relay: dead letter 1 is open", "now group: dead letter 2 is open", "now other: has not received it")
}

func TestCheckRetention(t *testing.T) {
	t.Parallel()
	d := newDesk(t)
	const kept = 5 * 8
	for hours, want := range map[int]string{0: "5d5h", 24: "4d5h", 165 - kept - 1: "1h"} {
		detail, err := CheckRetention(t.Context(), d.Pool, hour(hours))
		if err != nil || !strings.HasSuffix(detail, "be away for "+want) {
			t.Errorf("%d hours: %q, %v", hours, detail, err)
		}
	}
	if detail, err := CheckRetention(t.Context(), d.Pool, inbox.Retention-hour(kept)); err == nil ||
		!strings.Contains(err.Error(), "1d16h") {
		t.Errorf("equal: %q, %v", detail, err)
	}
}

// A letter that is asked for by its ID and is not open is an outcome too, and not silence.
func TestLettersThatAreNotOpen(t *testing.T) {
	t.Parallel()
	d := newDesk(t)
	d.fail(t, delivery("", "a"), delivery("", "b"))
	some := order
	some.Filter.IDs = []int64{1, 77}
	not := "refused: " + errNotOpen.Error()
	equal(t, "outcomes", d.redrive(t, some), "redriven", not)
	equal(t, "once more", d.redrive(t, some), not, not)
	if journey, err := Trace(t.Context(), d.Pool, uuid.NewString()); err != nil || journey.Known() {
		t.Errorf("an unknown message: %+v, %v", journey, err)
	}
}
