package main

import (
	"fmt"
	"io"
	"math"
	"strconv"
	"strings"
	"time"
)

// report is the table, as Markdown.
type report struct {
	machine string
	began   time.Time
	rounds  int
	quick   bool
	rows    []row
	results []results
	missed  []string // lines that are not as good as wanted
}

func (r *report) add(one row, found results) {
	r.rows, r.results = append(r.rows, one), append(r.results, found)
	for _, l := range one.lines {
		if !l.holds(found) {
			r.missed = append(r.missed, fmt.Sprintf("row %s, %s: %s instead of %s", one.name, l.label, number(l.judged(found)), l.wanted()))
		}
	}
}

// judged is the number that the bounds are about.
func (l line) judged(found results) float64 {
	if l.against != "" {
		return found.ratio(l).median
	}
	return found.value(l).median
}

func (l line) holds(found results) bool {
	judged := l.judged(found)
	return (l.least == 0 || judged >= l.least) && (l.most == 0 || judged <= l.most)
}

func (l line) wanted() string {
	unit := " " + l.unit
	if l.against != "" {
		unit = "×"
	}
	switch {
	case l.least > 0:
		return "≥ " + number(l.least) + unit
	case l.most > 0:
		return "≤ " + number(l.most) + unit
	}
	return ""
}

func (r *report) write(w io.Writer) error {
	var text strings.Builder
	fmt.Fprintf(&text, "# Benchmarks\n\nMade by `make bench` on %s", r.began.UTC().Format("2006-01-02 15:04 MST"))
	if r.quick {
		text.WriteString(", **with few messages: not to be quoted**")
	}
	fmt.Fprintf(&text, ".\n\nMachine: %s.\n\n", r.machine)
	fmt.Fprintf(&text, "Median (least to most) of %d rounds, in each of which the contestants of a row take turns. A ratio is one of two runs of the same round, so "+
		"it holds on a busy machine too, where rates do not; its median, least and most are over the rounds. Postgres commits with fsync, all queues are quorum "+
		"queues with the arguments of a consumer group's queue, messages are persistent and mandatory, and confirms are waited for.\n\n", r.rounds)
	text.WriteString("| Row | Contestant | Unit | Median | Least to most | Ratio | Least to most | To | Wanted |\n|---|---|---|--:|--:|--:|--:|---|---|\n")
	for i, one := range r.rows {
		for _, l := range one.lines {
			text.WriteString(l.markdown(one, r.results[i], r.rounds))
		}
	}
	text.WriteString("\n## What is measured, and what limits it\n\n")
	for _, one := range r.rows {
		fmt.Fprintf(&text, "- **%s** (`make bench ROWS=%s`). %s *Limit:* %s\n", one.title, one.name, one.how, one.limit)
	}
	for _, missed := range r.missed {
		fmt.Fprintf(&text, "\nNot as good as wanted: %s.\n", missed)
	}
	_, err := io.WriteString(w, text.String())
	return err
}

func (l line) markdown(one row, found results, rounds int) string {
	value := found.value(l)
	label := l.label
	if value.n != rounds {
		label += fmt.Sprintf(" (runs: %d)", value.n)
	}
	cells := []string{one.title, label, l.unit, number(value.median), span(value), "", "", "", l.wanted()}
	if l.against != "" {
		ratio := found.ratio(l)
		cells[5], cells[6], cells[7] = number(ratio.median), span(ratio), strings.Replace(l.against, ":", ", ", 1)
	}
	switch {
	case cells[8] == "":
	case l.holds(found):
		cells[8] += " ✓"
	default:
		cells[8] += " ✗"
	}
	return "| " + strings.Join(cells, " | ") + " |\n"
}

func span(s spread) string {
	if s.n < 2 {
		return ""
	}
	return number(s.least) + " – " + number(s.most)
}

// number prints three significant digits, and thousands with a comma.
func number(v float64) string {
	switch {
	case math.Abs(v) >= 10_000:
		text := strconv.FormatFloat(v, 'f', 0, 64)
		return text[:len(text)-3] + "," + text[len(text)-3:]
	case math.Abs(v) >= 100:
		return strconv.FormatFloat(v, 'f', 0, 64)
	case math.Abs(v) >= 10:
		return strconv.FormatFloat(v, 'f', 1, 64)
	}
	return strconv.FormatFloat(v, 'f', 2, 64)
}
