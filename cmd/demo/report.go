//go:build unix

package main

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"
)

const (
	good = "✓"
	bad  = "✗"
)

// examples is the maximum number of IDs that a finding shows.
const examples = 3

// report returns the ledger as text.
func report(f facts, found findings, done traffic, faults []fault) string {
	var out strings.Builder
	// A row without a mark is information and cannot fail.
	put := func(name row, value, mark, text string) {
		fmt.Fprintf(&out, "  %-20s %9s  %1s  %s\n", name, value, mark, text)
	}
	check := func(name row, value int, text string) {
		mark := good
		if found.of(name) > 0 {
			mark = bad
		}
		put(name, grouped(value), mark, text)
	}
	states := count(f.orders, func(o order) string { return o.Status })

	out.WriteString("\n  Ledger\n")
	check(rowPlaced, len(f.orders), done.byProtocol)
	put("calls", grouped(int(done.calls)), "", fmt.Sprintf(
		"of PlaceOrder, some concurrent; %s repeated for lack of an answer", grouped(int(done.repeated))))
	if len(faults) > 0 {
		put("faults", fmt.Sprint(len(faults)), "", faultText(faults))
	}
	put("messages", grouped(len(f.messages)), "", "committed to the outbox")
	check(rowPublished, f.published, "of them confirmed by the broker")
	put("copies seen", grouped(f.copies), "", fmt.Sprintf("on the exchange: %s published more than once",
		grouped(f.copies-len(f.arrivals))))
	put("duplicates absorbed", grouped(duplicates(f)), "", duplicateText(f))
	check(rowStates, states["confirmed"]+states["rejected"], fmt.Sprintf(
		"%s confirmed, %s rejected; %s more cancelled by their callers",
		grouped(states["confirmed"]), grouped(states["rejected"]), grouped(states["cancelled"])))
	check(rowNotifications, len(f.notifications), "one for each confirmation and each rejection")
	check(rowStock, sum(f.initial), stockText(f))
	check(rowDead, f.deadLetters, "given up by the relay or a consumer")
	check(rowLeft, f.retrying+sum(f.queued), "on queues or waiting for a retry")
	check(rowLost, found.of(rowLost), "acknowledged or committed, but without effect")
	check(rowDoubled, found.of(rowDoubled), "announced, notified or reserved twice")
	check(rowInvented, found.of(rowInvented), "on the exchange, but in no committed transaction")
	check(rowDisorder, found.of(rowDisorder), "within the messages of one order")

	writeLatencies(&out, f, faults)
	for _, finding := range found {
		shown := finding.ids[:min(len(finding.ids), examples)]
		more := ""
		if len(finding.ids) > len(shown) {
			more = fmt.Sprintf(" and %d more", len(finding.ids)-len(shown))
		}
		fmt.Fprintf(&out, "\n  %s %s: %s: %s%s", bad, finding.row, finding.text, strings.Join(shown, ", "), more)
	}
	return strings.TrimRight(out.String(), "\n")
}

func writeLatencies(out *strings.Builder, f facts, faults []fault) {
	seen := make(map[string]time.Time, len(f.arrivals))
	for _, arrival := range f.arrivals {
		seen[arrival.messageID] = arrival.at
	}
	applied := make(map[string]time.Time, len(f.taken))
	for _, row := range f.taken {
		applied[row.MessageID] = row.ReceivedAt
	}
	fmt.Fprintf(out, "\n  %-20s %9s %9s\n", "Latency", "p50", "p99")
	for _, span := range []struct {
		name string
		ends map[string]time.Time
	}{{"insert → broker", seen}, {"insert → effect", applied}} {
		all, calm := latencies(f.messages, faults, func(m message) (time.Time, bool) {
			at, ok := span.ends[m.MessageID]
			return at, ok
		})
		fmt.Fprintf(out, "  %-20s %9s %9s  all %s messages\n",
			span.name, rounded(all.p50), rounded(all.p99), grouped(all.count))
		if len(faults) > 0 {
			fmt.Fprintf(out, "  %-20s %9s %9s  the %s outside of faults\n",
				"", rounded(calm.p50), rounded(calm.p99), grouped(calm.count))
		}
	}
	out.WriteString("  From the insert of the outbox row, just before its commit, to the first copy on the exchange,\n" +
		"  and to the consumer's inbox row, which commits together with the effect.\n")
}

func duplicates(f facts) int {
	return sum(duplicatesByGroup(f))
}

func duplicatesByGroup(f facts) map[string]int {
	by := map[string]int{}
	for _, row := range f.taken {
		by[row.Consumer] += row.Copies - 1
	}
	return by
}

func duplicateText(f facts) string {
	by := duplicatesByGroup(f)
	var parts []string
	for _, group := range slices.Sorted(maps.Keys(by)) {
		parts = append(parts, fmt.Sprintf("%s in %s", grouped(by[group]), group))
	}
	return "published or delivered again: " + strings.Join(parts, ", ")
}

func stockText(f facts) string {
	var free, confirmed int
	for _, s := range f.stock {
		free += s.Free
		confirmed += s.Confirmed
	}
	return fmt.Sprintf("pieces of %d SKUs at first; %s free + %s in confirmed orders now",
		len(f.stock), grouped(free), grouped(confirmed))
}

func faultText(faults []fault) string {
	counts := count(faults, func(f fault) string { return f.kind })
	var parts []string
	for _, kind := range slices.Sorted(maps.Keys(counts)) {
		parts = append(parts, fmt.Sprintf("%s %d×", kind, counts[kind]))
	}
	return strings.Join(parts, ", ")
}

func sum(counts map[string]int) int {
	total := 0
	for _, n := range counts {
		total += n
	}
	return total
}

// rounded keeps two or three digits.
func rounded(d time.Duration) string {
	if d < time.Second {
		return fmt.Sprintf("%.0f ms", float64(d)/1e6)
	}
	return fmt.Sprintf("%.2f s", d.Seconds())
}
