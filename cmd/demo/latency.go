//go:build unix

package main

import (
	"slices"
	"time"
)

// latency summarizes the latency of messages.
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

// latencies measures all messages, and separately those that were committed outside of faults. The latency of a message
// starts with the insert of its outbox row.
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
		// The fault may also have affected messages that were committed just before it.
		return at.After(f.at.Add(-100*time.Millisecond)) && at.Before(f.healed)
	})
}
