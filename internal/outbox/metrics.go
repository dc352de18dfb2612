package outbox

import (
	"context"
	"errors"

	"example.com/orders/internal/messaging"
	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"
)

// meters are what a relay counts. Counters count when the cursor's move is committed, or, for verdicts, when they arrive.
type meters struct {
	published, returned, nacked, unknown, parked, steals metric.Int64Counter
	confirm                                              metric.Float64Histogram
	page                                                 metric.Int64Histogram
}

func (r *Relay) newMeters() (m meters) {
	meter := r.config.MeterProvider.Meter("example.com/orders/internal/outbox")
	counter := func(name, description string) metric.Int64Counter {
		c, err := meter.Int64Counter("outbox."+name, metric.WithUnit("{message}"), metric.WithDescription(description))
		report(err)
		return c
	}
	m.published = counter("published", "Messages published and confirmed by the broker.")
	m.returned = counter("returned", "Messages that the broker returned because no queue wants them.")
	m.nacked = counter("nacked", "Messages that the broker nacked; they are published again.")
	m.unknown = counter("unknown", "Messages whose verdict got lost with the connection; they are published again.")
	m.parked = counter("parked", "Messages moved to dead_letter because they cannot be published.")
	var errs [6]error
	m.steals, errs[0] = meter.Int64Counter("outbox.lease.steals", metric.WithUnit("{lease}"),
		metric.WithDescription("Shards taken over from a relay that had let its lease end."))
	m.confirm, errs[1] = meter.Float64Histogram("outbox.confirm.duration", metric.WithUnit("s"),
		metric.WithDescription("Time from writing a page to the broker until the verdict on its last message."),
		metric.WithExplicitBucketBoundaries(.001, .002, .004, .008, .015, .03, .06, .125, .25, .5, 1, 2, 5, 10, 30))
	m.page, errs[2] = meter.Int64Histogram("outbox.page.messages", metric.WithUnit("{message}"),
		metric.WithDescription("Messages of a page."), metric.WithExplicitBucketBoundaries(1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000))
	_, errs[3] = meter.Float64ObservableGauge("outbox.lag", metric.WithUnit("s"),
		metric.WithDescription("Age of the oldest message not delivered."), metric.WithFloat64Callback(func(_ context.Context, o metric.Float64Observer) error {
			for _, one := range r.backlogs() {
				o.Observe(one.Age.Seconds(), ofShard(one.Shard))
			}
			return nil
		}))
	_, errs[4] = meter.Int64ObservableGauge("outbox.backlog", metric.WithUnit("{message}"),
		metric.WithDescription("Messages not delivered."), metric.WithInt64Callback(func(_ context.Context, o metric.Int64Observer) error {
			for _, one := range r.backlogs() {
				o.Observe(one.Messages, ofShard(one.Shard))
			}
			return nil
		}))
	_, errs[5] = meter.Int64ObservableGauge("outbox.lease.held",
		metric.WithDescription("1 for a shard that this relay holds, 0 for one that it does not."), metric.WithInt64Callback(r.observeLeases))
	report(errors.Join(errs[:]...))
	return m
}

// report hands on what is wrong with an instrument's definition.
func report(err error) {
	if err != nil {
		otel.Handle(err)
	}
}

func (r *Relay) backlogs() []Backlog {
	if found := r.backlog.Load(); found != nil {
		return *found
	}
	return nil
}

func (r *Relay) observeLeases(_ context.Context, o metric.Int64Observer) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, one := range r.view {
		var held int64
		if t := r.tenures[one.Shard]; t != nil && t.leads.Load() {
			held = 1
		}
		o.Observe(held, ofShard(one.Shard))
	}
	return nil
}

func ofShard(shard int16) metric.MeasurementOption {
	return metric.WithAttributes(attribute.Int("shard", int(shard)))
}

// verdict counts what became of a message that was not confirmed.
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

// moved counts what a committed move of the cursor says.
func (m *meters) moved(ctx context.Context, p *progress) {
	if p.published > 0 {
		m.published.Add(ctx, int64(p.published))
	}
	for _, letter := range p.parked {
		m.parked.Add(ctx, 1, metric.WithAttributes(attribute.String("reason", string(letter.Reason))))
	}
}
