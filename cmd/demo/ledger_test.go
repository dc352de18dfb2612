//go:build unix

package main

import (
	"slices"
	"strings"
	"testing"
	"time"
)

// balanced returns a run of three orders: one confirmed, one rejected, and one confirmed and then cancelled.
func balanced() facts {
	at := time.Date(2026, 11, 22, 12, 0, 0, 0, time.UTC)
	f := facts{
		acked:  []string{"one", "two", "three"},
		orders: []order{{"one", "confirmed"}, {"two", "rejected"}, {"three", "cancelled"}},
		messages: []message{
			{1, "m1", eventPlaced, "one", at},
			{2, "m2", eventPlaced, "two", at},
			{3, "m3", eventConfirmed, "one", at},
			{4, "m4", eventRejected, "two", at},
			{5, "m5", eventPlaced, "three", at},
			{6, "m6", eventConfirmed, "three", at},
			{7, "m7", eventCancelled, "three", at},
		},
		published:     7,
		copies:        8,
		notifications: []notification{{"one", "confirmed"}, {"two", "rejected"}, {"three", "confirmed"}},
		stock:         []stock{{SKU: "apple", Total: 10, Free: 7, Reserved: 3, Held: 3, Confirmed: 3}},
		initial:       map[string]int{"apple": 10},
		queued:        map[string]int{"shop.fulfillment": 0},
		groups: map[string]string{
			eventPlaced: "fulfillment", eventCancelled: "fulfillment",
			eventConfirmed: "notifications", eventRejected: "notifications",
		},
	}
	for _, m := range f.messages {
		f.arrivals = append(f.arrivals, arrival{m.MessageID, at})
		f.taken = append(f.taken, taken{f.groups[m.Type], m.MessageID, 1, at})
	}
	f.taken[0].Copies = 2
	return f
}

func TestJudge(t *testing.T) {
	t.Parallel()
	if found := judge(balanced()); len(found) > 0 {
		t.Fatalf("findings in a balanced run: %v", found)
	}
	defects := []struct {
		name  string
		plant func(*facts)
		row   row
		text  string // part of the finding
		id    string
	}{
		{"an acknowledged order without a row",
			func(f *facts) { f.acked = append(f.acked, "four") },
			rowLost, "do not exist", "four"},
		{"an order without an acknowledged call",
			func(f *facts) { f.acked = f.acked[1:] },
			rowPlaced, "without an acknowledged call", "one"},
		{"an order without a final state",
			func(f *facts) { f.orders[0].Status = "placed" },
			rowLost, "neither", "one"},
		{"an order without its first message",
			func(f *facts) { f.messages[0].Key = "" },
			rowLost, "without their message", "one"},
		{"an order placed twice",
			func(f *facts) { f.messages[2].Type = eventPlaced },
			rowDoubled, "two messages", "one"},
		{"a state without its message",
			func(f *facts) { f.orders[2].Status = "rejected" },
			rowStates, "without the message", "three"},
		{"a message that never reached the broker",
			func(f *facts) { f.arrivals = slices.Delete(f.arrivals, 3, 4) },
			rowLost, "never seen", "m4"},
		{"a message that never reached its group",
			func(f *facts) { f.taken = slices.Delete(f.taken, 3, 4) },
			rowLost, "notifications", "m4"},
		{"a message that reached only another group",
			func(f *facts) { f.taken[3].Consumer = "fulfillment" },
			rowLost, "notifications", "m4"},
		{"a message that was rolled back",
			func(f *facts) { f.arrivals = append(f.arrivals, arrival{messageID: "m9"}) },
			rowInvented, "never committed", "m9"},
		{"swapped messages of a key",
			func(f *facts) { f.arrivals[5], f.arrivals[6] = f.arrivals[6], f.arrivals[5] },
			rowDisorder, "after a later one", "m6"},
		{"a second notification",
			func(f *facts) { f.notifications = append(f.notifications, f.notifications[0]) },
			rowDoubled, "notified twice", "one"},
		{"a missing notification",
			func(f *facts) { f.notifications = f.notifications[1:] },
			rowLost, "not notified", "one"},
		{"notifications of confirmation and rejection",
			func(f *facts) { f.notifications = append(f.notifications, notification{"one", "rejected"}) },
			rowNotifications, "of both confirmation and rejection", "one"},
		{"a notification without an event",
			func(f *facts) { f.notifications[0].Kind = "rejected" },
			rowNotifications, "without their event", "one"},
		{"stock reserved twice",
			func(f *facts) { f.stock[0].Free, f.stock[0].Reserved = 4, 6 },
			rowStock, "is not 4 free", "apple"},
		{"stock reserved without a reservation",
			func(f *facts) { f.stock[0].Held = 2 },
			rowStock, "but reservations of 2", "apple"},
		{"oversold stock",
			func(f *facts) { f.stock[0].Free, f.stock[0].Confirmed = -1, 11 },
			rowStock, "-1 free", "apple"},
		{"missing stock",
			func(f *facts) { f.stock = nil },
			rowStock, "missing", "apple"},
		{"a message left in the outbox",
			func(f *facts) { f.published = 6 },
			rowPublished, "6 published", "outbox_cursor"},
		{"a parked message",
			func(f *facts) { f.published, f.parked = 6, 1 },
			rowPublished, "1 parked", "outbox_cursor"},
		{"a dead letter",
			func(f *facts) { f.deadLetters = 1 },
			rowDead, "1 dead", "dead_letter"},
		{"a pending retry",
			func(f *facts) { f.retrying = 1 },
			rowLeft, "wait for a retry", "inbox_retry"},
		{"a message left on a queue",
			func(f *facts) { f.queued["shop.fulfillment"] = 2 },
			rowLeft, "2 messages", "shop.fulfillment"},
	}
	for _, defect := range defects {
		t.Run(defect.name, func(t *testing.T) {
			t.Parallel()
			f := balanced()
			defect.plant(&f)
			found := judge(f)
			if !slices.ContainsFunc(found, func(f finding) bool {
				return f.row == defect.row && strings.Contains(f.text, defect.text) && slices.Contains(f.ids, defect.id)
			}) {
				t.Errorf("got %v, want %q in row %q for %s", found, defect.text, defect.row, defect.id)
			}
			text := report(f, found, traffic{}, nil)
			if !strings.Contains(text, bad) || !strings.Contains(text, defect.id) {
				t.Errorf("the report does not show the finding:\n%s", text)
			}
		})
	}
}

func TestReportOfABalancedRunHasNoCross(t *testing.T) {
	t.Parallel()
	f := balanced()
	if text := report(f, judge(f), traffic{}, nil); strings.Contains(text, bad) {
		t.Errorf("got\n%s", text)
	}
}

func TestOrderIsThatOfTheKey(t *testing.T) {
	t.Parallel()
	f := balanced()
	f.arrivals[0], f.arrivals[1] = f.arrivals[1], f.arrivals[0] // of different keys
	if found := judge(f); len(found) > 0 {
		t.Errorf("got %v", found)
	}
}

func TestLatencies(t *testing.T) {
	t.Parallel()
	start := time.Date(2026, 11, 22, 12, 0, 0, 0, time.UTC)
	outage := fault{kind: "relay killed", at: start.Add(time.Minute), healed: start.Add(2 * time.Minute)}
	var messages []message
	ends := map[string]time.Time{}
	for second := range 100 {
		m := message{MessageID: time.Duration(second).String(),
			CreatedAt: start.Add(time.Duration(second) * time.Second)}
		took := 10 * time.Millisecond
		if second > 60 {
			took = time.Second
		}
		ends[m.MessageID] = m.CreatedAt.Add(took)
		messages = append(messages, m)
	}
	messages = append(messages, message{MessageID: "lost", CreatedAt: start})
	all, calm := latencies(messages, []fault{outage}, func(m message) (time.Time, bool) {
		at, ok := ends[m.MessageID]
		return at, ok
	})
	if want := (latency{100, 10 * time.Millisecond, time.Second}); all != want {
		t.Errorf("all: got %v, want %v", all, want)
	}
	if want := (latency{60, 10 * time.Millisecond, 10 * time.Millisecond}); calm != want {
		t.Errorf("outside of faults: got %v, want %v", calm, want)
	}
}

func TestGrouped(t *testing.T) {
	t.Parallel()
	for n, want := range map[int]string{
		0: "0", 999: "999", 1000: "1,000", 1234567: "1,234,567", -100: "-100", -1000: "-1,000",
	} {
		if got := grouped(n); got != want {
			t.Errorf("%d: got %s, want %s", n, got, want)
		}
	}
}
