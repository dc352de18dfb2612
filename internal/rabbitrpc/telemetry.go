package rabbitrpc

import (
	"context"
	"errors"
	"strings"
	"time"

	"connectrpc.com/connect/v2"
	amqp "github.com/rabbitmq/amqp091-go"
	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/metric"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/trace"
)

const scope = "example.com/shop/internal/rabbitrpc"

// meters are the instruments of one side.
type meters struct {
	duration metric.Float64Histogram
	inFlight metric.Int64UpDownCounter
	dropped  metric.Int64Counter
}

// newMeters makes the instruments of one side, "client" or "server".
func newMeters(provider metric.MeterProvider, side string) meters {
	meter, prefix := provider.Meter(scope), "rabbitrpc."+side+"."
	duration, err := meter.Float64Histogram(prefix+"duration", metric.WithUnit("s"),
		metric.WithDescription("Duration of calls, by procedure and code; its count is the number of calls."),
		metric.WithExplicitBucketBoundaries(.0005, .001, .002, .005, .01, .02, .05, .1, .2, .5, 1, 2, 5, 10, 30))
	inFlight, err2 := meter.Int64UpDownCounter(prefix+"in_flight", metric.WithUnit("{call}"),
		metric.WithDescription("Calls in flight."))
	dropped, err3 := meter.Int64Counter(prefix+"dropped", metric.WithUnit("{message}"),
		metric.WithDescription("Dropped requests or replies, by reason."))
	if err := errors.Join(err, err2, err3); err != nil {
		otel.Handle(err)
	}
	return meters{duration, inFlight, dropped}
}

// drop counts a dropped message.
func (m *meters) drop(ctx context.Context, reason string) {
	m.dropped.Add(ctx, 1, metric.WithAttributes(attribute.String("reason", reason)))
}

// observation traces and measures one call.
type observation struct {
	meters    *meters
	span      trace.Span
	began     time.Time
	procedure attribute.KeyValue
}

// observe starts the observation of a call.
func observe(
	ctx context.Context, m *meters, tracer trace.Tracer, kind trace.SpanKind, procedure string,
) (context.Context, *observation) {
	service, method, _ := strings.Cut(strings.TrimPrefix(procedure, "/"), "/")
	ctx, span := tracer.Start(ctx, service+"/"+method, trace.WithSpanKind(kind), trace.WithAttributes(
		attribute.String("rpc.system", "connect_rpc"), attribute.String("rpc.service", service),
		attribute.String("rpc.method", method), attribute.String("messaging.system", "rabbitmq"),
	))
	m.inFlight.Add(ctx, 1)
	return ctx, &observation{m, span, time.Now(), attribute.String("procedure", procedure)}
}

// end ends the observation. The context must not have ended.
func (o *observation) end(ctx context.Context, err error) {
	code := "ok"
	if err != nil {
		code = connect.CodeOf(err).String()
		o.span.SetStatus(codes.Error, code)
	}
	o.span.SetAttributes(attribute.String("rpc.response.status_code", code))
	o.span.End()
	o.meters.inFlight.Add(ctx, -1)
	attributes := metric.WithAttributes(o.procedure, attribute.String("code", code))
	o.meters.duration.Record(ctx, time.Since(o.began).Seconds(), attributes)
}

// carrier carries the trace context in message headers, as the outbox does for its messages.
type carrier amqp.Table

func (c carrier) Get(key string) string {
	value, _ := c[key].(string)
	return value
}
func (c carrier) Set(key, value string) { c[key] = value }
func (c carrier) Keys() []string        { return nil } // never called: the propagator's header names are fixed

var traceContext = propagation.TraceContext{}
