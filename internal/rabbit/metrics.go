package rabbit

import (
	"context"
	"errors"

	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"
)

// meters are the instruments of a publisher or a consumer. The client is "publisher", or the consumer's queue.
type meters struct {
	client                     metric.MeasurementOption
	connects                   metric.Int64Counter
	blocked, consuming, paused metric.Int64UpDownCounter
}

const (
	connectOK     = "ok"
	connectFailed = "failed"
)

func newMeters(provider metric.MeterProvider, client string) meters {
	if provider == nil {
		provider = otel.GetMeterProvider()
	}
	meter := provider.Meter("example.com/shop/internal/rabbit")
	m := meters{client: metric.WithAttributes(attribute.String("client", client))}
	var errs [4]error
	upDown := func(i int, name, unit, description string) (c metric.Int64UpDownCounter) {
		c, errs[i] = meter.Int64UpDownCounter("rabbit."+name, metric.WithUnit(unit),
			metric.WithDescription(description))
		return c
	}
	m.connects, errs[0] = meter.Int64Counter("rabbit.connects", metric.WithUnit("{connection}"),
		metric.WithDescription("Attempts to connect to the broker, by outcome: the first one, and one after each "+
			"failure."))
	m.blocked = upDown(1, "publishers.blocked", "{connection}",
		"Connections that the broker has blocked because it is short of memory or disk.")
	m.consuming = upDown(2, "consumers", "{consumer}", "Connected consumers of the queue.")
	m.paused = upDown(3, "batches.paused", "{batch}",
		"Batches that wait because the database cannot settle them, for example while it is unavailable.")
	if err := errors.Join(errs[:]...); err != nil {
		otel.Handle(err)
	}
	// Start each series at 0: increase() does not see the first event of a counter that appears with it.
	ctx := context.Background()
	m.connects.Add(ctx, 0, m.client, ofOutcome(connectOK))
	m.connects.Add(ctx, 0, m.client, ofOutcome(connectFailed))
	if client == "publisher" {
		m.blocked.Add(ctx, 0, m.client)
	} else {
		m.consuming.Add(ctx, 0, m.client)
		m.paused.Add(ctx, 0, m.client)
	}
	return m
}

func ofOutcome(outcome string) metric.MeasurementOption {
	return metric.WithAttributes(attribute.String("outcome", outcome))
}

// connected counts an attempt to connect.
func (m *meters) connected(ctx context.Context, err error) {
	outcome := connectOK
	if err != nil {
		outcome = connectFailed
	}
	m.connects.Add(ctx, 1, m.client, ofOutcome(outcome))
}

// change adds 1 to the counter when a state begins, and subtracts 1 when it ends.
func (m *meters) change(counter metric.Int64UpDownCounter, begins bool) {
	by := int64(-1)
	if begins {
		by = 1
	}
	counter.Add(context.Background(), by, m.client)
}
