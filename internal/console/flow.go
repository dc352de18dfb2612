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
	// interval is the time between two samples.
	interval = time.Second
	// maxPoints is how many samples are kept: 15 minutes.
	maxPoints = 900
	// window is how many intervals a rate covers. Processes report their counts once per second, but not in step with us.
	window = 5
)

// flow contains the samples for all watchers. A slow watcher misses samples and uses no memory.
type flow struct {
	mu      sync.Mutex
	points  []*opsv1.Point // a ring buffer once it is full
	oldest  int
	latest  *opsv1.WatchFlowResponse
	renewed chan struct{} // closed by the next sample
}

func newFlow() *flow { return &flow{renewed: make(chan struct{})} }

// add stores a sample and wakes the watchers.
func (f *flow) add(sample *opsv1.WatchFlowResponse) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.latest = sample
	if len(f.points) < maxPoints {
		f.points = append(f.points, sample.GetPoint())
	} else {
		f.points[f.oldest] = sample.GetPoint()
		f.oldest = (f.oldest + 1) % maxPoints
	}
	close(f.renewed)
	f.renewed = make(chan struct{})
}

// now returns the latest sample, nil before the first, and a channel that the next sample closes.
func (f *flow) now() (*opsv1.WatchFlowResponse, <-chan struct{}) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.latest, f.renewed
}

// history returns the points before the latest one, oldest first.
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
				sample = &opsv1.WatchFlowResponse{
					History: c.flow.history(), Point: sample.GetPoint(), Stations: sample.GetStations(),
				}
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

// totals are the counters at one time. A rate is the difference of two of them.
type totals struct {
	at                  time.Time
	inserted, published int64
	applied             map[string]int64 // by group
}

// rate returns the growth of a counter per second, 0 if it was reset.
func rate(from, to int64, over time.Duration) float64 {
	if over <= 0 || to < from {
		return 0
	}
	return float64(to-from) / over.Seconds()
}

// point summarizes a sample.
func point(at time.Time, r *reading, v *rates) *opsv1.Point {
	p := &opsv1.Point{At: timestamppb.New(at), Inserted: v.inserted, Published: v.published, Dead: r.dead}
	for _, shard := range r.shards {
		if !shard.Drained {
			p.Backlog, p.Lag = p.Backlog+shard.Backlog, max(p.Lag, shard.Lag)
		}
	}
	for _, status := range r.groups {
		p.Applied += v.applied[status.Consumer]
		p.Retrying += status.Retrying
	}
	for _, depth := range r.depths {
		p.Queued += depth.Ready
	}
	return p
}
