//go:build unix

package main

import (
	"slices"
	"time"
)

// latency is how long messages took.
type latency struct {
	count    int
	p50, p99 time.Duration
}

func measure(took []time.Duration) latency {
	if len(took) == 0 {
		return latency{}
	}
	slices.Sort(took)
	at := func(share float64) time.Duration { return took[int(share*float64(len(took)-1))] }
	return latency{len(took), at(0.50), at(0.99)}
}

// latencies measures all messages, and those that were committed while nothing was broken. Each message is measured from the
// insert of its outbox row.
func latencies(messages []message, faults []fault, end func(message) (time.Time, bool)) (all, calm latency) {
	var took, tookCalm []time.Duration
	for _, m := range messages {
		at, ok := end(m)
		if !ok {
			continue
		}
		took = append(took, at.Sub(m.CreatedAt))
		if !during(faults, m.CreatedAt) {
			tookCalm = append(tookCalm, at.Sub(m.CreatedAt))
		}
	}
	return measure(took), measure(tookCalm)
}

func during(faults []fault, at time.Time) bool {
	return slices.ContainsFunc(faults, func(f fault) bool {
		// Messages that were committed just before the fault may have been caught by it.
		return at.After(f.at.Add(-100*time.Millisecond)) && at.Before(f.healed)
	})
}
