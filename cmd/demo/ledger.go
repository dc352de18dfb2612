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

// finding is a discrepancy in a row.
type finding struct {
	row  row
	text string
	ids  []string // of orders, messages, SKUs or queues
}

// The message types of the domain.
const (
	eventPlaced    = "orders.v1.OrderPlaced"
	eventConfirmed = "orders.v1.OrderConfirmed"
	eventRejected  = "orders.v1.OrderRejected"
	eventCancelled = "orders.v1.OrderCancelled"
)

// judge compares the facts with the guarantees. The run balances if it returns no findings.
func judge(f facts) []finding {
	var found findings
	found.judgeOrders(f)
	found.judgeMessages(f)
	found.judgeOrder(f)
	found.judgeNotifications(f)
	found.judgeStock(f)
	if f.published+f.parked != len(f.messages) {
		found.add(rowPublished, fmt.Sprintf("the relay counts %d published and %d parked of %d messages",
			f.published, f.parked, len(f.messages)), "outbox_cursor")
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

// add adds an ID to the finding with the same row and text.
func (l *findings) add(row row, text, id string) {
	for i := range *l {
		if f := &(*l)[i]; f.row == row && f.text == text {
			f.ids = append(f.ids, id)
			return
		}
	}
	*l = append(*l, finding{row, text, []string{id}})
}

// of returns the number of IDs in a row's findings.
func (l findings) of(row row) int {
	count := 0
	for _, finding := range l {
		if finding.row == row {
			count += len(finding.ids)
		}
	}
	return count
}

// judgeOrders: an order exists if and only if its caller got an acknowledgement. It has one message of each type at
// most, and it reaches a final state.
func (l *findings) judgeOrders(f facts) {
	events := count(f.messages, func(m message) [2]string { return [2]string{m.Key, m.Type} })
	status := make(map[string]string, len(f.orders))
	acked := make(map[string]bool, len(f.acked))
	for _, id := range f.acked {
		acked[id] = true
	}
	for _, order := range f.orders {
		status[order.ID] = order.Status
		if !acked[order.ID] {
			l.add(rowPlaced, "orders without an acknowledged call", order.ID)
		}
		if order.Status == "placed" {
			l.add(rowLost, "orders that were neither confirmed nor rejected nor cancelled", order.ID)
		}
		for _, kind := range []string{eventPlaced, eventConfirmed, eventRejected, eventCancelled} {
			if events[[2]string{order.ID, kind}] > 1 {
				l.add(rowDoubled, "orders with two messages "+kind, order.ID)
			}
		}
		if events[[2]string{order.ID, eventPlaced}] == 0 {
			l.add(rowLost, "orders without their message "+eventPlaced, order.ID)
		}
		// A confirmed order may have been cancelled since.
		if final := eventOf[order.Status]; final != "" && events[[2]string{order.ID, final}] == 0 {
			l.add(rowStates, order.Status+" orders without the message "+final, order.ID)
		}
	}
	for _, id := range f.acked {
		if status[id] == "" {
			l.add(rowLost, "orders that were acknowledged and do not exist", id)
		}
	}
}

// eventOf maps a final state to the type of its message.
var eventOf = map[string]string{"confirmed": eventConfirmed, "rejected": eventRejected, "cancelled": eventCancelled}

// judgeMessages: every committed message reaches the broker and its consumer group, and no other message does.
func (l *findings) judgeMessages(f facts) {
	committed := make(map[string]bool, len(f.messages))
	seen := make(map[string]bool, len(f.arrivals))
	applied := make(map[[2]string]bool, len(f.taken))
	for _, arrival := range f.arrivals {
		seen[arrival.messageID] = true
	}
	for _, row := range f.taken {
		applied[[2]string{row.Consumer, row.MessageID}] = true
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
	for _, arrival := range f.arrivals {
		if !committed[arrival.messageID] {
			l.add(rowInvented, "messages on the exchange that were never committed", arrival.messageID)
		}
	}
}

// judgeOrder: the first copies of a key's messages arrive in commit order, which is the order of outbox.id.
func (l *findings) judgeOrder(f facts) {
	rows := make(map[string]message, len(f.messages))
	for _, m := range f.messages {
		rows[m.MessageID] = m
	}
	last := map[string]int64{}
	for _, arrival := range f.arrivals {
		m, ok := rows[arrival.messageID]
		if !ok || m.Key == "" {
			continue
		}
		if m.ID < last[m.Key] {
			l.add(rowDisorder, "messages that came after a later one of their key", m.MessageID)
		}
		last[m.Key] = max(last[m.Key], m.ID)
	}
}

// judgeNotifications: each confirmation and each rejection has exactly one notification. No constraint on the table
// prevents a second one.
func (l *findings) judgeNotifications(f facts) {
	events := count(f.messages, func(m message) [2]string { return [2]string{m.Key, m.Type} })
	sent := count(f.notifications, func(n notification) [2]string { return [2]string{n.OrderID, eventOf[n.Kind]} })
	for _, at := range sorted(sent) {
		switch {
		case sent[at] > 1:
			l.add(rowDoubled, "orders that were notified twice", at[0])
		case events[at] == 0:
			l.add(rowNotifications, "notifications without their event", at[0])
		}
	}
	for _, at := range sorted(events) {
		if (at[1] == eventConfirmed || at[1] == eventRejected) && sent[at] == 0 {
			l.add(rowLost, "orders that were not notified", at[0])
		}
	}
	for _, id := range both(sent) {
		l.add(rowNotifications, "orders with notifications of both confirmation and rejection", id)
	}
}

// both returns the orders with notifications of both kinds.
func both(sent map[[2]string]int) (ids []string) {
	for _, at := range sorted(sent) {
		if at[1] == eventConfirmed && sent[[2]string{at[0], eventRejected}] > 0 {
			ids = append(ids, at[0])
		}
	}
	return ids
}

// judgeStock: the initial stock is now free or belongs to confirmed orders.
func (l *findings) judgeStock(f facts) {
	known := map[string]bool{}
	for _, s := range f.stock {
		known[s.SKU] = true
		if f.initial[s.SKU] != s.Free+s.Confirmed || s.Free < 0 {
			l.add(rowStock, fmt.Sprintf("%d at first is not %d free + %d in confirmed orders",
				f.initial[s.SKU], s.Free, s.Confirmed), s.SKU)
		}
		if s.Reserved != s.Held || s.Total != s.Free+s.Reserved {
			l.add(rowStock, fmt.Sprintf("%d in total, %d free, %d reserved, but reservations of %d",
				s.Total, s.Free, s.Reserved, s.Held), s.SKU)
		}
	}
	for _, sku := range slices.Sorted(maps.Keys(f.initial)) {
		if !known[sku] {
			l.add(rowStock, "stock that is missing", sku)
		}
	}
}

func count[T any, K comparable](all []T, key func(T) K) map[K]int {
	counts := make(map[K]int, len(all))
	for _, element := range all {
		counts[key(element)]++
	}
	return counts
}

func sorted(counts map[[2]string]int) [][2]string {
	return slices.SortedFunc(maps.Keys(counts), func(a, b [2]string) int {
		return strings.Compare(a[0]+a[1], b[0]+b[1])
	})
}
