package ops

import (
	"errors"
	"testing"

	"example.com/shop/internal/deadletter"
	"example.com/shop/internal/dev/testenv"
)

// An operator's action on a group is committed together with its record, and a refused action leaves no record.
func TestActsOnGroupsAreRecorded(t *testing.T) {
	t.Parallel()
	db := testenv.Postgres(t)
	operator := Operator{DB: db, Groups: []Group{{Name: "group"}}}
	why := deadletter.Note{Actor: "ann", Reason: "why"}
	for i := range 3 {
		_, err := db.Exec(t.Context(), `
			INSERT INTO inbox_retry (consumer, message_id, type, key, payload, headers, attempts, due_at, last_error)
			VALUES ('group', $1, 't.T', 'k', '', '{}', 1, now(), 'broken')`, string(rune('a'+i)))
		if err != nil {
			t.Fatal(err)
		}
	}
	ok := func(err error) {
		t.Helper()
		if err != nil {
			t.Error(err)
		}
	}
	refused := func(err error) {
		t.Helper()
		if !errors.As(err, new(Refusal)) {
			t.Errorf("not refused: %v", err)
		}
	}
	refused(operator.Pause(t.Context(), "stranger", why))
	refused(operator.Pause(t.Context(), "group", deadletter.Note{Actor: "ann", Reason: " "}))
	refused(operator.Resume(t.Context(), "group", why))
	ok(operator.Pause(t.Context(), "group", why))
	refused(operator.Pause(t.Context(), "group", why))
	ok(operator.Resume(t.Context(), "group", why))
	if id, err := operator.SkipHead(t.Context(), "group", "k", why); id != "a" || err != nil {
		t.Errorf("skipped %s, %v", id, err)
	}
	if n, err := operator.ParkKey(t.Context(), "group", "k", why); n != 2 || err != nil {
		t.Errorf("parked %d, %v", n, err)
	}
	_, err := operator.ParkKey(t.Context(), "group", "k", why)
	refused(err)

	entries, err := Log(t.Context(), db, 10)
	ok(err)
	got := ""
	for _, entry := range entries {
		got += entry.Action + " " + entry.Target + " by " + entry.Actor + " (" + entry.Reason + ") " + entry.Detail + "\n"
	}
	want := "park group/k by ann (why) 2 messages\nskip group/k by ann (why) message a\n" +
		"resume group by ann (why) \npause group by ann (why) \n"
	if got != want {
		t.Errorf("audit log:\n%s", got)
	}
	if _, err := db.Exec(t.Context(), `DELETE FROM operator_audit`); err == nil {
		t.Error("the audit log can be deleted")
	}
}

// A discard can be undone, and then the dead letter can be redriven. A redrive cannot be undone.
func TestReopen(t *testing.T) {
	t.Parallel()
	db := testenv.Postgres(t)
	why := deadletter.Note{Actor: "ann", Reason: "why"}
	_, err := db.Exec(t.Context(), `
		INSERT INTO dead_letter (consumer, message_id, type, key, payload, headers, reason, error, attempts)
		VALUES ('group', 'm', 't.T', 'k', '', '{}', 'skipped', 'skipped by ann', 1)`)
	if err != nil {
		t.Fatal(err)
	}
	selection := Selection{Filter: deadletter.Filter{}, Note: why, Groups: []Group{{Name: "group"}}}
	each := func(o Outcome) {
		if o.Err != nil {
			t.Error(o.Err)
		}
	}
	if err := Reopen(t.Context(), db, 1, why); !errors.As(err, new(Refusal)) {
		t.Errorf("an open dead letter was reopened: %v", err)
	}
	if err := Discard(t.Context(), db, selection, each); err != nil {
		t.Fatal(err)
	}
	if err := Reopen(t.Context(), db, 1, why); err != nil {
		t.Fatal(err)
	}
	if err := Redrive(t.Context(), db, selection, each); err != nil {
		t.Fatal(err)
	}
	if err := Reopen(t.Context(), db, 1, why); !errors.As(err, new(Refusal)) {
		t.Errorf("a redrive was undone: %v", err)
	}
	records, err := deadletter.Audit(t.Context(), db, 1)
	if err != nil || len(records) != 3 || records[1].Resolution != deadletter.Reopened ||
		records[2].Resolution != deadletter.Redriven {
		t.Errorf("audit log: %+v, %v", records, err)
	}
}
