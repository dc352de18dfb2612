package ops

import (
	"errors"
	"testing"

	"example.com/shop/internal/deadletter"
	"example.com/shop/internal/dev/testenv"
)

// What operators do to groups is done with its record or not at all, and what cannot be done leaves none.
func TestActsOnGroupsAreRecorded(t *testing.T) {
	t.Parallel()
	db := testenv.Postgres(t)
	desk := Operator{DB: db, Groups: []string{"group"}}
	why := deadletter.Note{Actor: "ann", Reason: "why"}
	for i := range 3 {
		_, err := db.Exec(t.Context(), `INSERT INTO inbox_retry (consumer, message_id, type, key, payload, headers,
			attempts, due_at, last_error)
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
	refused(desk.Pause(t.Context(), "stranger", why))
	refused(desk.Pause(t.Context(), "group", deadletter.Note{Actor: "ann", Reason: " "}))
	refused(desk.Resume(t.Context(), "group", why))
	ok(desk.Pause(t.Context(), "group", why))
	refused(desk.Pause(t.Context(), "group", why))
	ok(desk.Resume(t.Context(), "group", why))
	if id, err := desk.SkipHead(t.Context(), "group", "k", why); id != "a" || err != nil {
		t.Errorf("skipped %s, %v", id, err)
	}
	if n, err := desk.ParkKey(t.Context(), "group", "k", why); n != 2 || err != nil {
		t.Errorf("parked %d, %v", n, err)
	}
	_, err := desk.ParkKey(t.Context(), "group", "k", why)
	refused(err)

	entries, err := Log(t.Context(), db, 10)
	ok(err)
	got := ""
	for _, one := range entries {
		got += one.Action + " " + one.Target + " by " + one.Actor + " (" + one.Reason + ") " + one.Detail + "\n"
	}
	want := "park group/k by ann (why) 2 messages\nskip group/k by ann (why) message a\nresume group by ann (why) " +
		"\npause group by ann (why) \n"
	if got != want {
		t.Errorf("audit log:\n%s", got)
	}
	if _, err := db.Exec(t.Context(), `DELETE FROM operator_audit`); err == nil {
		t.Error("the audit log can be deleted")
	}
}

// A discard can be taken back, and then the letter be redriven; a redrive cannot.
func TestReopen(t *testing.T) {
	t.Parallel()
	db := testenv.Postgres(t)
	why := deadletter.Note{Actor: "ann", Reason: "why"}
	_, err := db.Exec(t.Context(), `INSERT INTO dead_letter (consumer, message_id, type, key, payload, headers, reason,
		error, attempts)
		VALUES ('group', 'm', 't.T', 'k', '', '{}', 'skipped', 'skipped by ann', 1)`)
	if err != nil {
		t.Fatal(err)
	}
	order := Selection{Filter: deadletter.Filter{}, Note: why, Groups: []string{"group"}}
	each := func(o Outcome) {
		if o.Err != nil {
			t.Error(o.Err)
		}
	}
	if err := Reopen(t.Context(), db, 1, why); !errors.As(err, new(Refusal)) {
		t.Errorf("an open one is reopened: %v", err)
	}
	if err := Discard(t.Context(), db, order, each); err != nil {
		t.Fatal(err)
	}
	if err := Reopen(t.Context(), db, 1, why); err != nil {
		t.Fatal(err)
	}
	if err := Redrive(t.Context(), db, order, each); err != nil {
		t.Fatal(err)
	}
	if err := Reopen(t.Context(), db, 1, why); !errors.As(err, new(Refusal)) {
		t.Errorf("what was redriven is taken back: %v", err)
	}
	records, err := deadletter.Audit(t.Context(), db, 1)
	if err != nil || len(records) != 3 || records[1].Resolution != deadletter.Reopened ||
		records[2].Resolution != deadletter.Redriven {
		t.Errorf("audit log: %+v, %v", records, err)
	}
}
