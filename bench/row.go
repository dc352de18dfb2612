package main

import (
	"cmp"
	"context"
	"fmt"
	"os"
	"slices"
	"time"
)

// row is a scenario: contestants that take turns, and the table lines that show their results.
type row struct {
	name  string
	title string
	// The text under the table: how describes the measurement, limit names the bottleneck.
	how, limit  string
	contestants []contestant
	lines       []line
	// shortTurns splits each round into this many. Contestants that differ little need it: they must run under the same
	// conditions.
	shortTurns int
}

// contestant is a system or setup under comparison.
type contestant struct {
	name string
	run  func(ctx context.Context, b *bench) (measured, error)
	// once runs a slow contestant in the first round only. Its line in the report says so.
	once bool
}

// measured contains the result of a run for each metric.
type measured map[string]float64

// The common metrics. Contestants may report others.
const (
	rate   = "rate"   // messages a second
	memory = "memory" // peak resident MiB
)

// line is a line of the table: a metric of a contestant, optionally compared with another contestant.
type line struct {
	label, contestant, metric, unit string
	// against names the contestant that the ratio divides by. After a colon it may name another metric.
	against string
	// least and most bound the median of the ratio, or of the value if there is no ratio. 0 means no bound.
	least, most float64
}

// results contains the runs of each contestant, one for each round.
type results map[string][]measured

// measure runs the contestants in turns. Every second round runs them in reverse, so that none always follows the same
// contestant.
func (r row) measure(ctx context.Context, b *bench, rounds int) (results, error) {
	found := results{}
	for round := range rounds * cmp.Or(r.shortTurns, 1) {
		turns := slices.Clone(r.contestants)
		if round%2 == 1 {
			slices.Reverse(turns)
		}
		for _, c := range turns {
			if c.once && round > 0 {
				continue
			}
			began := time.Now()
			values, err := c.run(ctx, b)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", c.name, err)
			}
			found[c.name] = append(found[c.name], values)
			fmt.Fprintf(os.Stderr, "%s round %d: %s: %s(%.0f s)\n",
				r.name, round+1, c.name, values, time.Since(began).Seconds())
		}
	}
	return found, nil
}

func (m measured) String() (text string) {
	for _, metric := range sortedKeys(m) {
		text += fmt.Sprintf("%s %s, ", metric, number(m[metric]))
	}
	return text
}
