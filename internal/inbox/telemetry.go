package inbox

import (
	"context"
	"errors"
	"slices"
	"time"

	"example.com/shop/internal/deadletter"
	"example.com/shop/internal/messaging"
	"example.com/shop/internal/postgres"
	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/metric"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/trace"
)

const scope = "example.com/shop/internal/inbox"

// meters are the metrics of an inbox. Counters increase after the commit.
type meters struct {
	group                                             metric.MeasurementOption
	applied, duplicates, retries, crashes, deadLetter metric.Int64Counter
	handler                                           metric.Float64Histogram
}

func newMeters(provider metric.MeterProvider, group string) meters {
	meter := provider.Meter(scope)
	m := meters{group: metric.WithAttributes(attribute.String("consumer", group))}
	var errs [6]error
	counter := func(i int, name, description string) (c metric.Int64Counter) {
		c, errs[i] = meter.Int64Counter("inbox."+name, metric.WithUnit("{message}"),
			metric.WithDescription(description))
		return c
	}
	m.applied = counter(0, "applied", "Messages whose effect was committed.")
	m.duplicates = counter(1, "duplicates", "Copies that were absorbed because the message was taken already.")
	m.retries = counter(2, "retries", "Runs of handlers that failed and will be retried.")
	m.crashes = counter(3, "crashes",
		"Messages moved to inbox_retry unhandled, because two of their deliveries were interrupted.")
	m.deadLetter = counter(4, "dead_letters", "Messages moved to dead_letter.")
	m.handler, errs[5] = meter.Float64Histogram("inbox.handler.duration", metric.WithUnit("s"),
		metric.WithDescription("Duration of one run of a handler."),
		metric.WithExplicitBucketBoundaries(.0005, .001, .002, .005, .01, .02, .05, .1, .2, .5, 1, 2, 5, 10, 30))
	if err := errors.Join(errs[:]...); err != nil {
		otel.Handle(err)
	}
	m.count(context.Background(), &outcome{}) // increase() misses the first event of a counter that appears with it
	for _, reason := range reasons {
		m.deadLetter.Add(context.Background(), 0, m.group, ofReason(reason))
	}
	return m
}

// reasons are the reasons for which an inbox makes dead letters.
var reasons = slices.DeleteFunc(slices.Clone(deadletter.Reasons), func(reason deadletter.Reason) bool {
	return slices.Contains([]deadletter.Reason{
		deadletter.Unroutable, deadletter.Refused, // only a relay meets these
		deadletter.Skipped, // an operator's command, in another process
	}, reason)
})

// groupStatusSQL explains the cost of counting. This statement runs once in a few seconds, however often metrics are
// scraped.
const waitingCountSQL = `
SELECT heads.keyless + keyed.messages, heads.keys, coalesce(heads.oldest, 0)
FROM (
    SELECT count(*) FILTER (WHERE key = '') AS keyless, count(*) FILTER (WHERE key <> '') AS keys,
        extract(epoch FROM clock_age(min(created_at) FILTER (WHERE key <> '')))::float8 AS oldest
    FROM inbox_retry WHERE consumer = $1 AND due_at IS NOT NULL) AS heads
CROSS JOIN (SELECT count(*) AS messages FROM inbox_retry WHERE consumer = $1 AND key <> '') AS keyed`

// waiting summarizes inbox_retry.
type waiting struct {
	messages, keys int64
	blocked        float64 // seconds since the first message of a key began to wait
}

// observeRetries reports the contents of inbox_retry whenever metrics are read, until stop is called. A reading of the
// table is used for maxAge.
func (b *Inbox) observeRetries(maxAge time.Duration) (stop func()) {
	meter := b.config.MeterProvider.Meter(scope)
	retrying, err1 := meter.Int64ObservableGauge("inbox.retrying", metric.WithUnit("{message}"),
		metric.WithDescription("Messages that wait for a retry, or behind another message of their key."))
	keys, err2 := meter.Int64ObservableGauge("inbox.blocked_keys", metric.WithUnit("{key}"),
		metric.WithDescription("Keys whose messages wait for a retry of the first one."))
	blocked, err3 := meter.Float64ObservableGauge("inbox.blocked", metric.WithUnit("s"),
		metric.WithDescription("Time for which the longest blocked key has been blocked; 0 if none is blocked."))
	sample := postgres.Sample[waiting]{MaxAge: maxAge, Read: b.countWaiting}
	registration, err4 := meter.RegisterCallback(func(ctx context.Context, o metric.Observer) error {
		if found, err := sample.Get(ctx); err == nil { // Sample logs the error; the other metrics are still useful
			o.ObserveInt64(retrying, found.messages, b.meters.group)
			o.ObserveInt64(keys, found.keys, b.meters.group)
			o.ObserveFloat64(blocked, found.blocked, b.meters.group)
		}
		return nil
	}, retrying, keys, blocked)
	if err := errors.Join(err1, err2, err3, err4); err != nil {
		otel.Handle(err)
		return func() {}
	}
	return func() { _ = registration.Unregister() }
}

func (b *Inbox) countWaiting(ctx context.Context) (found waiting, err error) {
	err = b.db.QueryRow(ctx, waitingCountSQL, b.group.name).Scan(&found.messages, &found.keys, &found.blocked)
	return found, err
}

func ofReason(reason deadletter.Reason) metric.MeasurementOption {
	return metric.WithAttributes(attribute.String("reason", string(reason)))
}

// count counts what a committed transaction did.
func (m *meters) count(ctx context.Context, done *outcome) {
	m.applied.Add(ctx, int64(done.applied), m.group)
	m.duplicates.Add(ctx, int64(done.copies), m.group)
	m.retries.Add(ctx, int64(done.retries), m.group)
	m.crashes.Add(ctx, int64(done.broken), m.group)
	m.dead(ctx, done.dead...)
}

// dead counts dead letters that are committed.
func (m *meters) dead(ctx context.Context, letters ...deadletter.Letter) {
	for _, letter := range letters {
		m.deadLetter.Add(ctx, 1, m.group, ofReason(letter.Reason))
	}
}

// traceOf returns ctx within the trace in a message's headers.
func traceOf(ctx context.Context, headers map[string]string) context.Context {
	return propagation.TraceContext{}.Extract(ctx, propagation.MapCarrier(headers))
}

// traced runs a handler in a span that continues the message's trace.
func (b *Inbox) traced(ctx context.Context, d messaging.Delivery, run func(ctx context.Context) error) error {
	ctx = traceOf(ctx, d.Headers)
	ctx, span := b.tracer.Start(ctx, "process "+d.Type, trace.WithSpanKind(trace.SpanKindConsumer),
		trace.WithAttributes(
			attribute.String("messaging.system", "rabbitmq"), attribute.String("messaging.operation.type", "process"),
			attribute.String("messaging.consumer.group.name", b.group.name),
			attribute.String("messaging.message.id", d.ID)))
	defer span.End()
	began := time.Now()
	err := run(ctx)
	b.meters.handler.Record(ctx, time.Since(began).Seconds(), b.meters.group)
	if err != nil {
		span.RecordError(err)
		span.SetStatus(codes.Error, "handler failed")
	}
	return err
}
