package main

import (
	"fmt"
	"io"
	"math"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"
)

// report prints the results as Markdown: the page docs/benchmarks.md.
type report struct {
	machine string
	began   time.Time
	rounds  int
	quick   bool
	rows    []row
	results []results
	missed  []string // lines outside their bounds
}

func (r *report) add(row row, found results) {
	r.rows, r.results = append(r.rows, row), append(r.results, found)
	for _, l := range row.lines {
		if !l.holds(found) {
			r.missed = append(r.missed, fmt.Sprintf("row %s, %s: %s instead of %s",
				row.name, l.label, number(l.judged(found)), l.wanted()))
		}
	}
}

// judged returns the number that the bounds apply to.
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
	made := "Made by `make bench` on " + r.began.UTC().Format("2006-01-02 15:04 MST")
	if r.quick {
		made += ", **with few messages: do not quote it**"
	}
	fmt.Fprintf(&text, "# Benchmarks\n\n%s.\n\n%s\n\n", made, wrapped("Machine: "+r.machine+"."))
	text.WriteString(wrapped(fmt.Sprintf("Median (least to most) of %d rounds. The contestants of a row take turns "+
		"within each round. A ratio compares two runs of the same round, so unlike a rate it also holds on a busy "+
		"machine; its median, least and most are over the rounds. Postgres commits with fsync. All queues are quorum "+
		"queues with the arguments of a consumer group's queue. Messages are persistent and mandatory, and publishers "+
		"wait for confirms.", r.rounds)) + "\n\n")
	text.WriteString("| Row | Contestant | Unit | Median | Least to most | Ratio | Least to most | To | Wanted |\n")
	text.WriteString("|---|---|---|--:|--:|--:|--:|---|---|\n")
	for i, row := range r.rows {
		for _, l := range row.lines {
			text.WriteString(l.markdown(row, r.results[i], r.rounds))
		}
	}
	text.WriteString("\n## What is measured, and what limits it\n\n")
	for _, row := range r.rows {
		text.WriteString(wrapped(fmt.Sprintf("- **%s** (`make bench ROWS=%s`). %s *Limit:* %s",
			row.title, row.name, row.how, row.limit)) + "\n")
	}
	for _, missed := range r.missed {
		fmt.Fprintf(&text, "\nMissed target: %s.\n", missed)
	}
	_, err := io.WriteString(w, text.String())
	return err
}

// wrapped breaks a paragraph, or an item of a list, into lines of at most 120 columns.
func wrapped(paragraph string) string {
	indent := ""
	if strings.HasPrefix(paragraph, "- ") {
		indent = "  "
	}
	var lines []string
	line := ""
	for i, word := range strings.Fields(paragraph) {
		switch {
		case i == 0:
			line = word
		case utf8.RuneCountInString(line+" "+word) > 120:
			lines, line = append(lines, line), indent+word
		default:
			line += " " + word
		}
	}
	return strings.Join(append(lines, line), "\n")
}

func (l line) markdown(row row, found results, rounds int) string {
	value := found.value(l)
	label := l.label
	if value.n != rounds {
		label += fmt.Sprintf(" (runs: %d)", value.n)
	}
	cells := []string{row.title, label, l.unit, number(value.median), span(value), "", "", "", l.wanted()}
	if l.against != "" {
		ratio := found.ratio(l)
		cells[5], cells[6] = number(ratio.median), span(ratio)
		cells[7] = strings.Replace(l.against, ":", ", ", 1)
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

// number prints at least three significant digits, and a comma before every three digits from 10,000 on.
func number(v float64) string {
	switch {
	case math.Abs(v) >= 10_000:
		text := strconv.FormatFloat(v, 'f', 0, 64)
		for i := len(text) - 3; i > 0 && text[i-1] != '-'; i -= 3 {
			text = text[:i] + "," + text[i:]
		}
		return text
	case math.Abs(v) >= 100:
		return strconv.FormatFloat(v, 'f', 0, 64)
	case math.Abs(v) >= 10:
		return strconv.FormatFloat(v, 'f', 1, 64)
	}
	return strconv.FormatFloat(v, 'f', 2, 64)
}
