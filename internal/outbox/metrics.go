package outbox

import (
	"context"
	"errors"
	"sync/atomic"
	"time"

	"example.com/shop/internal/deadletter"
	"example.com/shop/internal/messaging"
	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"
)

const scope = "example.com/shop/internal/outbox"

// meters are the relay's instruments. Verdicts count when they arrive, everything else when the cursor's move commits.
type meters struct {
	published, returned, nacked, unknown, unheard, parked, steals metric.Int64Counter
	confirm                                                       metric.Float64Histogram
	page                                                          metric.Int64Histogram
}

func (r *Relay) newMeters() (m meters) {
	meter := r.config.MeterProvider.Meter(scope)
	counter := func(name, description string) metric.Int64Counter {
		c, err := meter.Int64Counter("outbox."+name, metric.WithUnit("{message}"), metric.WithDescription(description))
		report(err)
		return c
	}
	m.published = counter("published", "Messages published and confirmed by the broker.")
	m.returned = counter("returned", "Messages that the broker returned because no queue is bound for them.")
	m.nacked = counter("nacked", "Messages that the broker nacked; they are published again.")
	m.unknown = counter("unknown", "Messages whose verdict was lost with the connection; they are published again.")
	m.unheard = counter("unheard", "Published messages that no queue was bound for, and that did not need one.")
	m.parked = counter("parked", "Messages moved to dead_letter because they cannot be published.")
	var errs [5]error
	m.steals, errs[0] = meter.Int64Counter("outbox.lease.steals", metric.WithUnit("{lease}"),
		metric.WithDescription("Shards taken over from a relay whose lease expired."))
	m.confirm, errs[1] = meter.Float64Histogram("outbox.confirm.duration", metric.WithUnit("s"),
		metric.WithDescription("Time from writing a page to the broker until the verdict on its last message."),
		metric.WithExplicitBucketBoundaries(.001, .002, .004, .008, .015, .03, .06, .125, .25, .5, 1, 2, 5, 10, 30))
	m.page, errs[2] = meter.Int64Histogram("outbox.page.messages", metric.WithUnit("{message}"),
		metric.WithDescription("Messages of a page."),
		metric.WithExplicitBucketBoundaries(1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000))
	_, errs[3] = meter.Int64ObservableGauge("outbox.lease.held",
		metric.WithDescription("1 for a shard that this relay holds, 0 for one that it does not."),
		metric.WithInt64Callback(r.observeLeases))
	errs[4] = r.backlog.observe(meter)
	report(errors.Join(errs[:]...))
	ctx := context.Background()
	for _, reason := range []deadletter.Reason{deadletter.Unroutable, deadletter.Malformed, deadletter.Refused} {
		m.parked.Add(ctx, 0, ofReason(reason))
	}
	for _, counter := range []metric.Int64Counter{m.published, m.returned, m.nacked, m.unknown, m.unheard, m.steals} {
		counter.Add(ctx, 0) // increase() would miss the first event if the counter appeared only with it
	}
	return m
}

// report passes an error in an instrument's definition to OpenTelemetry's error handler.
func report(err error) {
	if err != nil {
		otel.Handle(err)
	}
}

// measured is the backlog's last measurement.
type measured struct {
	last atomic.Pointer[measurement]
}

type measurement struct {
	shards []Backlog
	at     time.Time
}

func (m *measured) set(shards []Backlog) { m.last.Store(&measurement{shards, time.Now()}) }

// observe reports the backlog. Waiting messages age even while the database does not answer.
func (m *measured) observe(meter metric.Meter) error {
	lag, err1 := meter.Float64ObservableGauge("outbox.lag", metric.WithUnit("s"),
		metric.WithDescription("Age of the oldest undelivered message."))
	backlog, err2 := meter.Int64ObservableGauge("outbox.backlog", metric.WithUnit("{message}"),
		metric.WithDescription("Undelivered messages."))
	_, err3 := meter.RegisterCallback(func(_ context.Context, o metric.Observer) error {
		last := m.last.Load()
		if last == nil {
			return nil
		}
		for _, shard := range last.shards {
			if shard.Messages > 0 {
				shard.Age += time.Since(last.at)
			}
			o.ObserveFloat64(lag, shard.Age.Seconds(), ofShard(shard.Shard))
			o.ObserveInt64(backlog, shard.Messages, ofShard(shard.Shard))
		}
		return nil
	}, lag, backlog)
	return errors.Join(err1, err2, err3)
}

func (r *Relay) observeLeases(_ context.Context, o metric.Int64Observer) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, shard := range r.view {
		var held int64
		if l := r.leases[shard.Shard]; l != nil && l.leads.Load() {
			held = 1
		}
		o.Observe(held, ofShard(shard.Shard))
	}
	return nil
}

func ofShard(shard int16) metric.MeasurementOption {
	return metric.WithAttributes(attribute.Int("shard", int(shard)))
}

func ofReason(reason deadletter.Reason) metric.MeasurementOption {
	return metric.WithAttributes(attribute.String("reason", string(reason)))
}

// verdict counts the verdict on a message that was not confirmed.
func (m *meters) verdict(ctx context.Context, verdict error) {
	switch {
	case errors.Is(verdict, messaging.ErrReturned):
		m.returned.Add(ctx, 1)
	case errors.Is(verdict, messaging.ErrNacked):
		m.nacked.Add(ctx, 1)
	case errors.Is(verdict, messaging.ErrUnknown):
		m.unknown.Add(ctx, 1)
	}
}

// moved counts what a committed move of the cursor has recorded.
func (m *meters) moved(ctx context.Context, p *progress) {
	if p.published > 0 {
		m.published.Add(ctx, int64(p.published))
	}
	if p.unheard > 0 {
		m.unheard.Add(ctx, int64(p.unheard))
	}
	for _, letter := range p.parked {
		m.parked.Add(ctx, 1, ofReason(letter.Reason))
	}
}
