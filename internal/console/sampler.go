package console

import (
	"context"
	"maps"
	"sync"
	"time"

	"example.com/shop/internal/deadletter"
	opsv1 "example.com/shop/internal/gen/ops/v1"
	"example.com/shop/internal/inbox"
	"example.com/shop/internal/ops"
	"example.com/shop/internal/postgres"
	"example.com/shop/internal/rabbit"
)

// patience bounds one reading. What does not answer by then cannot be reached, as far as a console is concerned.
const patience = 3 * time.Second

// reading is what database and broker say at one time, or why they do not.
type reading struct {
	shards    []ops.Shard
	relays    []ops.RunningRelay
	standings []inbox.GroupStatus
	sessions  map[string]int
	dead      int64
	database  error

	depths  []rabbit.Depth
	broker  error
	dangers []rabbit.Danger
}

// velocity is how fast messages pass, a second.
type velocity struct {
	inserted, published float64
	applied             map[string]float64
}

// sampler reads, and remembers what rates need.
type sampler struct {
	console *Console
	queues  []string
	// dead is read less often: with 100,000 open letters it is the one thing here that takes time.
	dead postgres.Sample[int64]
	// dangers are read less often, too: they change when somebody changes them.
	dangers postgres.Sample[[]rabbit.Danger]
	owners  map[string]map[string]int64 // what each process had applied, by group
	recent  []totals
}

func newSampler(c *Console) *sampler {
	s := &sampler{console: c, owners: map[string]map[string]int64{}}
	s.dead.Read = func(ctx context.Context) (int64, error) {
		n, _, err := deadletter.Count(ctx, c.db, deadletter.Filter{})
		return n, err
	}
	s.dangers.Read, s.dangers.MaxAge = c.config.Dangers, 30*time.Second
	for _, group := range c.config.Groups {
		s.queues = append(s.queues, group.Queue)
	}
	return s
}

// sample reads once and judges.
func (s *sampler) sample(ctx context.Context) *opsv1.WatchFlowResponse {
	r := s.read(ctx)
	at := time.Now()
	v := s.measure(at, r)
	return &opsv1.WatchFlowResponse{Point: point(at, r, v), Stations: s.console.judge(r, v)}
}

// read asks the database and the broker at the same time: one that is away must not make the other look so.
func (s *sampler) read(ctx context.Context) *reading {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	r := &reading{}
	var both sync.WaitGroup
	both.Go(func() { r.database = s.readDatabase(ctx, r) })
	both.Go(func() { r.depths, r.broker = s.console.config.Depths(ctx, s.queues) })
	if s.console.config.Dangers != nil {
		both.Go(func() { r.dangers, _ = s.dangers.Get(ctx) })
	}
	both.Wait()
	return r
}

func (s *sampler) readDatabase(ctx context.Context, r *reading) (err error) {
	db := s.console.db
	if r.shards, err = ops.Shards(ctx, db); err != nil {
		return err
	}
	if r.relays, err = ops.Relays(ctx, db); err != nil {
		return err
	}
	if r.standings, err = inbox.GroupStatuses(ctx, db, s.console.desk.Groups); err != nil {
		return err
	}
	if r.sessions, err = ops.Sessions(ctx, db); err != nil {
		return err
	}
	r.dead, err = s.dead.Get(ctx)
	return err
}

// measure makes rates of a reading and those before it. While the database is away nothing passes.
func (s *sampler) measure(at time.Time, r *reading) *velocity {
	v := &velocity{applied: map[string]float64{}}
	if r.database != nil {
		return v
	}
	now := totals{at: at, applied: map[string]int64{}}
	if n := len(s.recent); n > 0 {
		maps.Copy(now.applied, s.recent[n-1].applied)
	}
	for _, shard := range r.shards {
		now.published += shard.Published
		now.inserted += shard.Published + shard.Parked + shard.Backlog
	}
	for _, standing := range r.standings {
		now.applied[standing.Consumer] += s.progress(standing)
	}
	s.recent = append(s.recent, now)
	if len(s.recent) > window+1 {
		s.recent = s.recent[1:]
	}
	first := s.recent[0]
	over := at.Sub(first.at)
	v.inserted, v.published = rate(first.inserted, now.inserted, over), rate(first.published, now.published, over)
	for group, total := range now.applied {
		v.applied[group] = rate(first.applied[group], total, over)
	}
	return v
}

// progress is what the processes of a group have applied since the last reading. One that is new has applied all it
// tells, except when we are new ourselves.
func (s *sampler) progress(standing inbox.GroupStatus) (applied int64) {
	before, known := s.owners[standing.Consumer]
	for owner, total := range standing.Applied {
		if known {
			applied += max(0, total-before[owner])
		}
	}
	s.owners[standing.Consumer] = standing.Applied
	return applied
}
