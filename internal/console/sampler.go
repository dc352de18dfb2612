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

// readTimeout bounds one reading. The console shows a server that does not answer in time as unreachable.
const readTimeout = 3 * time.Second

// reading is the state of database and broker at one time, or the errors of reading it.
type reading struct {
	shards   []ops.Shard
	relays   []ops.RunningRelay
	groups   []inbox.GroupStatus
	sessions map[string]int
	dead     int64
	database error

	depths  []rabbit.Depth
	broker  error
	dangers []rabbit.Danger
}

// rates are messages per second.
type rates struct {
	inserted, published float64
	applied             map[string]float64
}

// sampler makes samples, and keeps the counters that rates need.
type sampler struct {
	console *Console
	queues  []string
	// dead is read less often, since counting 100,000 open dead letters is slow.
	dead postgres.Sample[int64]
	// dangers are read less often, since policies rarely change.
	dangers postgres.Sample[[]rabbit.Danger]
	owners  map[string]map[string]int64 // how many messages each process had applied, by group
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

// sample reads the state and evaluates it.
func (s *sampler) sample(ctx context.Context) *opsv1.WatchFlowResponse {
	r := s.read(ctx)
	at := time.Now()
	v := s.measure(at, r)
	return &opsv1.WatchFlowResponse{Point: point(at, r, v), Stations: s.console.stations(r, v)}
}

// read reads the database and the broker concurrently, so that one that is down does not time out the other.
func (s *sampler) read(ctx context.Context) *reading {
	ctx, cancel := context.WithTimeout(ctx, readTimeout)
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
	if r.groups, err = inbox.GroupStatuses(ctx, db, ops.Names(s.console.operator.Groups)); err != nil {
		return err
	}
	if r.sessions, err = ops.Sessions(ctx, db); err != nil {
		return err
	}
	r.dead, err = s.dead.Get(ctx)
	return err
}

// measure calculates the rates from a reading and those before it. They are 0 while the database is unreachable.
func (s *sampler) measure(at time.Time, r *reading) *rates {
	v := &rates{applied: map[string]float64{}}
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
	for _, status := range r.groups {
		now.applied[status.Consumer] += s.progress(status)
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

// progress returns how many messages the processes of a group have applied since the last reading. The whole count of a
// new process is progress, except in the first reading.
func (s *sampler) progress(status inbox.GroupStatus) (applied int64) {
	before, known := s.owners[status.Consumer]
	for owner, total := range status.Applied {
		if known {
			applied += max(0, total-before[owner])
		}
	}
	s.owners[status.Consumer] = status.Applied
	return applied
}
