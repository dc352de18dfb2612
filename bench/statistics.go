package main

import (
	"maps"
	"slices"
	"strings"
	"time"
)

// spread summarizes the runs of a contestant, or their ratios. Why not golang.org/x/perf/benchmath, as benchstat does:
// it compares the centers of two independent samples. The runs here are paired, and each round has its own ratio.
type spread struct {
	median, least, most float64
	n                   int
}

func spreadOf(values []float64) spread {
	if len(values) == 0 {
		return spread{}
	}
	sorted := slices.Sorted(slices.Values(values))
	middle := sorted[len(sorted)/2]
	if len(sorted)%2 == 0 {
		middle = (middle + sorted[len(sorted)/2-1]) / 2
	}
	return spread{middle, sorted[0], sorted[len(sorted)-1], len(sorted)}
}

func (r results) values(contestant, metric string) []float64 {
	var all []float64
	for _, run := range r[contestant] {
		all = append(all, run[metric])
	}
	return all
}

// value returns the spread of a line's values.
func (r results) value(l line) spread { return spreadOf(r.values(l.contestant, l.metric)) }

// ratio returns the spread of the ratios within each round. Load that affects both runs of a round cancels out.
func (r results) ratio(l line) spread {
	contestant, metric, given := strings.Cut(l.against, ":")
	if !given {
		metric = l.metric
	}
	base := r.values(contestant, metric)
	var ratios []float64
	for i, value := range r.values(l.contestant, l.metric) {
		if i < len(base) && base[i] > 0 {
			ratios = append(ratios, value/base[i])
		}
	}
	return spreadOf(ratios)
}

// milliseconds returns a percentile of durations.
func milliseconds(all []time.Duration, percentile float64) float64 {
	if len(all) == 0 {
		return 0
	}
	sorted := slices.Sorted(slices.Values(all))
	return sorted[min(len(sorted)-1, int(float64(len(sorted))*percentile/100))].Seconds() * 1000
}

func sortedKeys(m measured) []string { return slices.Sorted(maps.Keys(m)) }
