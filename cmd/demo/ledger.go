//go:build unix

package main

import (
	"fmt"
	"maps"
	"slices"
	"strings"
)

// row names a line of the ledger.
type row string

const (
	rowPlaced        row = "placed"
	rowPublished     row = "published"
	rowStates        row = "confirmed + rejected"
	rowNotifications row = "notifications"
	rowStock         row = "stock"
	rowDead          row = "dead letters"
	rowLeft          row = "left behind"
	rowLost          row = "lost"
	rowDoubled       row = "doubled"
	rowInvented      row = "never committed"
	rowDisorder      row = "out of order"
)

// finding is something that does not balance: what, and where.
type finding struct {
	row  row
	what string
	ids  []string // of orders, messages, SKUs or queues
}

// eventPlaced and the others are the messages of the domain.
const (
	eventPlaced    = "orders.v1.OrderPlaced"
	eventConfirmed = "orders.v1.OrderConfirmed"
	eventRejected  = "orders.v1.OrderRejected"
	eventCancelled = "orders.v1.OrderCancelled"
)

// judge compares what was promised with what is there. No findings mean that everything balances.
func judge(f facts) []finding {
	var found findings
	found.judgeOrders(f)
	found.judgeMessages(f)
	found.judgeOrder(f)
	found.judgeNotifications(f)
	found.judgeStock(f)
	if f.published+f.parked != len(f.messages) {
		found.add(rowPublished, fmt.Sprintf("the relay counts %d published and %d parked of %d messages", f.published, f.parked, len(f.messages)), "outbox_cursor")
	}
	if f.parked > 0 {
		found.add(rowPublished, fmt.Sprintf("%d parked by the relay", f.parked), "outbox_cursor")
	}
	if f.deadLetters > 0 {
		found.add(rowDead, fmt.Sprintf("%d dead letters", f.deadLetters), "dead_letter")
	}
	if f.retrying > 0 {
		found.add(rowLeft, fmt.Sprintf("%d messages wait for a retry", f.retrying), "inbox_retry")
	}
	for _, queue := range slices.Sorted(maps.Keys(f.queued)) {
		if f.queued[queue] > 0 {
			found.add(rowLeft, fmt.Sprintf("%d messages on a queue", f.queued[queue]), queue)
		}
	}
	return found
}

type findings []finding

// add notes something about an ID, together with the others of its sort.
func (l *findings) add(row row, what, id string) {
	for i := range *l {
		if one := &(*l)[i]; one.row == row && one.what == what {
			one.ids = append(one.ids, id)
			return
		}
	}
	*l = append(*l, finding{row, what, []string{id}})
}

// of returns how many things are wrong in a row.
func (l findings) of(row row) int {
	count := 0
	for _, one := range l {
		if one.row == row {
			count += len(one.ids)
		}
	}
	return count
}

// judgeOrders: an order exists if and only if its caller was told so, is told of once, and comes to its end.
func (l *findings) judgeOrders(f facts) {
	events := count(f.messages, func(m message) [2]string { return [2]string{m.Key, m.Type} })
	status := make(map[string]string, len(f.orders))
	acked := make(map[string]bool, len(f.acked))
	for _, id := range f.acked {
		acked[id] = true
	}
	for _, one := range f.orders {
		status[one.ID] = one.Status
		if !acked[one.ID] {
			l.add(rowPlaced, "orders that no caller knows of", one.ID)
		}
		if one.Status == "placed" {
			l.add(rowLost, "orders that were neither confirmed nor rejected nor cancelled", one.ID)
		}
		for _, kind := range []string{eventPlaced, eventConfirmed, eventRejected, eventCancelled} {
			if events[[2]string{one.ID, kind}] > 1 {
				l.add(rowDoubled, "orders with two messages "+kind, one.ID)
			}
		}
		if events[[2]string{one.ID, eventPlaced}] == 0 {
			l.add(rowLost, "orders without their message "+eventPlaced, one.ID)
		}
		// A confirmed order may have been cancelled since.
		if final := eventOf[one.Status]; final != "" && events[[2]string{one.ID, final}] == 0 {
			l.add(rowStates, "orders that are "+one.Status+" without a message that says so", one.ID)
		}
	}
	for _, id := range f.acked {
		if status[id] == "" {
			l.add(rowLost, "orders that were acknowledged and do not exist", id)
		}
	}
}

// eventOf is the message that tells of a final state.
var eventOf = map[string]string{"confirmed": eventConfirmed, "rejected": eventRejected, "cancelled": eventCancelled}

// judgeMessages: what is committed reaches the broker and its group, and nothing else does.
func (l *findings) judgeMessages(f facts) {
	committed := make(map[string]bool, len(f.messages))
	seen := make(map[string]bool, len(f.arrivals))
	applied := make(map[[2]string]bool, len(f.taken))
	for _, one := range f.arrivals {
		seen[one.messageID] = true
	}
	for _, one := range f.taken {
		applied[[2]string{one.Consumer, one.MessageID}] = true
	}
	for _, m := range f.messages {
		committed[m.MessageID] = true
		if !seen[m.MessageID] {
			l.add(rowLost, "messages that were committed and never seen on the exchange", m.MessageID)
		}
		if group := f.groups[m.Type]; group != "" && !applied[[2]string{group, m.MessageID}] {
			l.add(rowLost, "messages that never reached "+group, m.MessageID)
		}
	}
	for _, one := range f.arrivals {
		if !committed[one.messageID] {
			l.add(rowInvented, "messages on the exchange that were never committed", one.messageID)
		}
	}
}

// judgeOrder: the first copies of a key's messages come in the order in which they were committed, which is that of outbox.id.
func (l *findings) judgeOrder(f facts) {
	rows := make(map[string]message, len(f.messages))
	for _, m := range f.messages {
		rows[m.MessageID] = m
	}
	last := map[string]int64{}
	for _, one := range f.arrivals {
		m, ok := rows[one.messageID]
		if !ok || m.Key == "" {
			continue
		}
		if m.ID < last[m.Key] {
			l.add(rowDisorder, "messages that came after a later one of their key", m.MessageID)
		}
		last[m.Key] = max(last[m.Key], m.ID)
	}
}

// judgeNotifications: exactly one for each confirmation and each rejection. Nothing in the table prevents a second one.
func (l *findings) judgeNotifications(f facts) {
	events := count(f.messages, func(m message) [2]string { return [2]string{m.Key, m.Type} })
	sent := count(f.notifications, func(n notification) [2]string { return [2]string{n.OrderID, eventOf[n.Kind]} })
	for _, at := range sorted(sent) {
		switch {
		case sent[at] > 1:
			l.add(rowDoubled, "orders that were notified twice", at[0])
		case events[at] == 0:
			l.add(rowNotifications, "notifications of something that did not happen", at[0])
		}
	}
	for _, at := range sorted(events) {
		if (at[1] == eventConfirmed || at[1] == eventRejected) && sent[at] == 0 {
			l.add(rowLost, "orders that were not notified", at[0])
		}
	}
	for _, id := range both(sent) {
		l.add(rowNotifications, "orders that were notified of confirmation and of rejection", id)
	}
}

// both returns the orders with notifications of either kind.
func both(sent map[[2]string]int) (ids []string) {
	for _, at := range sorted(sent) {
		if at[1] == eventConfirmed && sent[[2]string{at[0], eventRejected}] > 0 {
			ids = append(ids, at[0])
		}
	}
	return ids
}

// judgeStock: what was there at first is free now or held by confirmed orders.
func (l *findings) judgeStock(f facts) {
	known := map[string]bool{}
	for _, s := range f.stock {
		known[s.SKU] = true
		if f.initial[s.SKU] != s.Free+s.Confirmed || s.Free < 0 {
			l.add(rowStock, fmt.Sprintf("%d at first is not %d free + %d in confirmed orders", f.initial[s.SKU], s.Free, s.Confirmed), s.SKU)
		}
		if s.Reserved != s.Held || s.Total != s.Free+s.Reserved {
			l.add(rowStock, fmt.Sprintf("%d in all, %d free, %d reserved, but reservations of %d", s.Total, s.Free, s.Reserved, s.Held), s.SKU)
		}
	}
	for _, sku := range slices.Sorted(maps.Keys(f.initial)) {
		if !known[sku] {
			l.add(rowStock, "stock that is gone", sku)
		}
	}
}

func count[T any, K comparable](all []T, key func(T) K) map[K]int {
	counts := make(map[K]int, len(all))
	for _, one := range all {
		counts[key(one)]++
	}
	return counts
}

func sorted(counts map[[2]string]int) [][2]string {
	return slices.SortedFunc(maps.Keys(counts), func(a, b [2]string) int {
		return strings.Compare(a[0]+a[1], b[0]+b[1])
	})
}
