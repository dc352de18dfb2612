package main

import (
	"context"
	"fmt"
	"sync"
	"time"

	"example.com/shop/internal/messaging"
	"example.com/shop/internal/rabbit"
	"golang.org/x/sync/errgroup"
)

// countdown measures the rate of messages, and calls end after want of them.
type countdown struct {
	want int
	end  func()

	mu          sync.Mutex
	n, first    int // first is the size of the first batch, which starts the clock
	began, last time.Time
}

func (c *countdown) done(n int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.n >= c.want {
		return
	}
	c.last = time.Now()
	if c.n == 0 {
		c.began, c.first = c.last, n
	}
	c.n += n
	if c.n >= c.want {
		c.end()
	}
}

func (c *countdown) rate() (measured, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.n < c.want {
		return nil, fmt.Errorf("only %d of %d were done", c.n, c.want)
	}
	return measured{rate: float64(c.n-c.first) / c.last.Sub(c.began).Seconds()}, nil
}

// stopwatch measures the time between two moments per ID. The two may be reported in either order.
type stopwatch struct {
	mu          sync.Mutex
	began, over map[string]time.Time
}

func newStopwatch() *stopwatch {
	return &stopwatch{began: map[string]time.Time{}, over: map[string]time.Time{}}
}

func (s *stopwatch) reset() {
	s.mu.Lock()
	defer s.mu.Unlock()
	clear(s.began)
	clear(s.over)
}

func (s *stopwatch) start(id string) { s.note(s.began, id) }
func (s *stopwatch) stop(id string)  { s.note(s.over, id) }

func (s *stopwatch) note(moments map[string]time.Time, id string) {
	now := time.Now()
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, again := moments[id]; !again { // ignore duplicates
		moments[id] = now
	}
}

// times returns the measured times, and the number of IDs that have not stopped yet.
func (s *stopwatch) times() (all []time.Duration, open int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for id, began := range s.began {
		if over, ok := s.over[id]; ok {
			all = append(all, over.Sub(began))
		} else {
			open++
		}
	}
	return all, open
}

// settled waits until every started ID has stopped, and returns the times.
func (s *stopwatch) settled(ctx context.Context) ([]time.Duration, error) {
	for began := time.Now(); ; time.Sleep(20 * time.Millisecond) {
		all, open := s.times()
		if open == 0 {
			return all, nil
		}
		if err := ctx.Err(); err != nil || time.Since(began) > time.Minute {
			return nil, fmt.Errorf("%d of %d have not ended", open, open+len(all))
		}
	}
}

// openLoop calls fn perSecond times a second, on schedule even while earlier calls are in progress. The calls thus also
// measure the time during which the system does not respond.
func openLoop(ctx context.Context, perSecond int, duration time.Duration, fn func(ctx context.Context) error) error {
	group, ctx := errgroup.WithContext(ctx)
	began := time.Now()
	for i := range int(duration.Seconds() * float64(perSecond)) {
		time.Sleep(time.Until(began.Add(time.Duration(i) * time.Second / time.Duration(perSecond))))
		if ctx.Err() != nil {
			break
		}
		group.Go(func() error { return fn(ctx) })
	}
	return group.Wait()
}

// counting calls done after each batch that the handler has processed.
func counting(handle rabbit.Handler, done func(n int)) rabbit.Handler {
	return watching(handle, func(deliveries []messaging.Delivery) { done(len(deliveries)) })
}

func watching(handle rabbit.Handler, seen func(deliveries []messaging.Delivery)) rabbit.Handler {
	return func(ctx context.Context, deliveries []messaging.Delivery) error {
		if err := handle(ctx, deliveries); err != nil {
			return err
		}
		seen(deliveries)
		return nil
	}
}

// watchedPublisher reports confirmed messages. It does so when the relay has all confirms of a page, which is later
// than the confirm of most of its messages.
type watchedPublisher struct {
	messaging.Publisher
	confirmed func(m messaging.Message)
}

func (p *watchedPublisher) Publish(ctx context.Context, messages []messaging.Message) (messaging.Receipt, error) {
	receipt, err := p.Publisher.Publish(ctx, messages)
	return &watchedReceipt{receipt, messages, p.confirmed}, err
}

type watchedReceipt struct {
	messaging.Receipt
	messages  []messaging.Message
	confirmed func(m messaging.Message)
}

func (r *watchedReceipt) Wait(ctx context.Context) []error {
	verdicts := r.Receipt.Wait(ctx)
	for i, verdict := range verdicts {
		if verdict == nil {
			r.confirmed(r.messages[i])
		}
	}
	return verdicts
}
