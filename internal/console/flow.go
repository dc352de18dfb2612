package console

import (
	"context"
	"sync"
	"time"

	opsv1 "example.com/shop/internal/gen/ops/v1"
	"example.com/shop/internal/gen/ops/v1/opsv1connect"
	"google.golang.org/protobuf/types/known/timestamppb"
)

const (
	// interval is the time between two samples, and keep how many are remembered: 15 minutes.
	interval = time.Second
	keep     = 900
	// window is how many samples a rate is made of: the processes tell their counts once a second, but not in step with
	// us.
	window = 5
)

// flow is what was sampled, for all who watch. Who is slow misses samples and costs no memory.
type flow struct {
	mu      sync.Mutex
	points  []*opsv1.Point // a ring once it is full
	oldest  int
	latest  *opsv1.WatchFlowResponse
	renewed chan struct{} // closed by the next sample
}

func newFlow() *flow { return &flow{renewed: make(chan struct{})} }

// add takes in a sample.
func (f *flow) add(sample *opsv1.WatchFlowResponse) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.latest = sample
	if len(f.points) < keep {
		f.points = append(f.points, sample.GetPoint())
	} else {
		f.points[f.oldest] = sample.GetPoint()
		f.oldest = (f.oldest + 1) % keep
	}
	close(f.renewed)
	f.renewed = make(chan struct{})
}

// now returns the latest sample, nil before the first, and a channel that is closed when there is another.
func (f *flow) now() (*opsv1.WatchFlowResponse, <-chan struct{}) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.latest, f.renewed
}

// history returns the points before the latest one, the oldest first.
func (f *flow) history() []*opsv1.Point {
	f.mu.Lock()
	defer f.mu.Unlock()
	all := append(append([]*opsv1.Point{}, f.points[f.oldest:]...), f.points[:f.oldest]...)
	return all[:max(0, len(all)-1)]
}

// Run samples the flow until ctx is done.
func (c *Console) Run(ctx context.Context) error {
	ticker := time.NewTicker(interval)
	defer ticker.Stop()
	s := newSampler(c)
	for {
		sample := s.sample(ctx)
		if ctx.Err() != nil {
			return nil
		}
		c.flow.add(sample)
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		}
	}
}

// WatchFlow implements ops.v1.OpsService.
func (c *Console) WatchFlow(
	ctx context.Context, _ *opsv1.WatchFlowRequest, stream opsv1connect.OpsServiceWatchFlowServerStream,
) error {
	for first := true; ; {
		sample, renewed := c.flow.now()
		if sample != nil {
			if first {
				first = false
				sample = &opsv1.WatchFlowResponse{History: c.flow.history(), Point: sample.GetPoint(),
					Stations: sample.GetStations()}
			}
			if err := stream.Send(sample); err != nil {
				return err
			}
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-renewed:
		}
	}
}

// totals are counters at one time. Rates are made of two of them.
type totals struct {
	at                  time.Time
	inserted, published int64
	applied             map[string]int64 // by group
}

// rate is how fast a counter grew. One that shrank has begun anew.
func rate(from, to int64, over time.Duration) float64 {
	if over <= 0 || to < from {
		return 0
	}
	return float64(to-from) / over.Seconds()
}

// point puts a sample's numbers together.
func point(at time.Time, r *reading, v *velocity) *opsv1.Point {
	p := &opsv1.Point{At: timestamppb.New(at), Inserted: v.inserted, Published: v.published, Dead: r.dead}
	for _, shard := range r.shards {
		if !shard.Drained {
			p.Backlog, p.Lag = p.Backlog+shard.Backlog, max(p.Lag, shard.Lag)
		}
	}
	for _, standing := range r.standings {
		p.Applied += v.applied[standing.Consumer]
		p.Retrying += standing.Retrying
	}
	for _, depth := range r.depths {
		p.Queued += depth.Ready
	}
	return p
}
