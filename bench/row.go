package main

import (
	"cmp"
	"context"
	"fmt"
	"os"
	"slices"
	"time"
)

// row is a scenario: contestants that take turns, and the lines of the table that come of their runs.
type row struct {
	name  string
	title string
	// how says what is measured, and limit what the numbers are limited by: a sentence each, for the text under the table.
	how, limit  string
	contestants []contestant
	lines       []line
	// shortTurns makes this many rounds of each one, for contestants that differ so little that the machine must not change between them.
	shortTurns int
}

// contestant is one of those that are compared.
type contestant struct {
	name string
	run  func(ctx context.Context, b *bench) (measured, error)
	// once: too long for every round. It runs in the first one, and its line says so.
	once bool
}

// measured is what one run found: a number for each metric.
type measured map[string]float64

// The metrics; a contestant may have others.
const (
	rate   = "rate"   // messages a second
	memory = "memory" // MiB resident at most
)

// line is a line of the table: a metric of a contestant, maybe against that of another.
type line struct {
	label, contestant, metric, unit string
	// against names the contestant, and maybe after a colon the metric, that the ratio divides by.
	against string
	// least and most bound the median: of the ratio if there is one, else of the value. 0 means no bound.
	least, most float64
}

// results are the runs of each contestant, a round each.
type results map[string][]measured

// measure runs the contestants in turns; every other round goes backwards, so that none always follows the same one.
func (r row) measure(ctx context.Context, b *bench, rounds int) (results, error) {
	found := results{}
	for round := range rounds * cmp.Or(r.shortTurns, 1) {
		turns := slices.Clone(r.contestants)
		if round%2 == 1 {
			slices.Reverse(turns)
		}
		for _, one := range turns {
			if one.once && round > 0 {
				continue
			}
			began := time.Now()
			values, err := one.run(ctx, b)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", one.name, err)
			}
			found[one.name] = append(found[one.name], values)
			fmt.Fprintf(os.Stderr, "%s round %d: %s: %s(%.0f s)\n", r.name, round+1, one.name, values, time.Since(began).Seconds())
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
