package outbox

import (
	"context"
	"maps"

	"example.com/shop/internal/messaging"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/trace"
	"go.opentelemetry.io/otel/trace/noop"
)

// The trace of a message: "create" where it is inserted, which is a child of whatever the caller is doing; "publish"
// for each try of the relay, as a child of that, though hours may lie between; and "process" in the consumer, as a
// child of the publishing that it got. The context travels in the row's headers and in those of AMQP, as W3C
// traceparent.

// startCreate starts the span of an insert, with the provider of the span that ctx is in: where nothing is recorded, it
// costs nothing.
func startCreate(ctx context.Context, messages []messaging.Message) (context.Context, trace.Span) {
	within := trace.SpanFromContext(ctx)
	if !within.IsRecording() {
		return ctx, noop.Span{}
	}
	attributes := []attribute.KeyValue{attribute.String("messaging.system", "rabbitmq"),
		attribute.String("messaging.operation.type", "create")}
	if len(messages) == 1 {
		attributes = append(attributes, attribute.String("messaging.message.id", messages[0].ID.String()))
	} else {
		attributes = append(attributes, attribute.Int("messaging.batch.message_count", len(messages)))
	}
	return within.TracerProvider().Tracer(scope).Start(ctx, "create "+messages[0].Type,
		trace.WithSpanKind(trace.SpanKindProducer), trace.WithAttributes(attributes...))
}

// withTrace returns headers with the W3C trace context of ctx, as a copy unless there is none. It is stored in the row
// because the relay publishes much later, in a process that knows nothing of the request. A caller's trace must not be
// what makes a message invalid: its state, which is the caller's to fill, is left out if it is long, and all of it if
// there is no room.
func withTrace(ctx context.Context, headers map[string]string) map[string]string {
	carrier := propagation.MapCarrier{}
	if len(headers) <= messaging.MaxHeaders-2 {
		propagation.TraceContext{}.Inject(ctx, carrier)
	}
	if len(carrier["tracestate"]) > messaging.MaxHeaderValue {
		delete(carrier, "tracestate")
	}
	if len(carrier) == 0 {
		return headers
	}
	maps.Copy(carrier, headers)
	return carrier
}

// traceOf returns ctx within the trace that a message carries.
func traceOf(ctx context.Context, headers map[string]string) context.Context {
	return propagation.TraceContext{}.Extract(ctx, propagation.MapCarrier(headers))
}

// spanMaker makes the spans of publishing. Without a provider it makes none, and looks at no message.
type spanMaker struct{ tracer trace.Tracer }

func newSpanMaker(provider trace.TracerProvider) (m spanMaker) {
	if provider != nil {
		m.tracer = provider.Tracer(scope)
	}
	return m
}

// spans are those of the messages of a page, by their place among those sent; nil if none of them is recorded.
type spans map[int]trace.Span

// start starts a span for each message whose trace is recorded, and makes the message carry it on.
func (m spanMaker) start(ctx context.Context, messages []messaging.Message) (started spans) {
	if m.tracer == nil {
		return nil
	}
	for i := range messages {
		one := &messages[i]
		created := traceOf(ctx, one.Headers)
		if !trace.SpanContextFromContext(created).IsSampled() {
			continue
		}
		publishing, span := m.tracer.Start(created, "publish "+one.Type, trace.WithSpanKind(trace.SpanKindProducer),
			trace.WithAttributes(
				attribute.String("messaging.system", "rabbitmq"), attribute.String("messaging.operation.type", "send"),
				attribute.String("messaging.rabbitmq.destination.routing_key", one.Type),
				attribute.String("messaging.message.id", one.ID.String())))
		if started == nil {
			started = spans{}
		}
		started[i] = span
		// The row's own stay what they are: they may be published again, or parked.
		one.Headers = maps.Clone(one.Headers)
		propagation.TraceContext{}.Inject(publishing, propagation.MapCarrier(one.Headers))
	}
	return started
}

// end ends the spans with the verdict on each, or all of them with the error that kept them from one.
func (s spans) end(verdicts []error, all error) {
	for i, span := range s {
		err := all
		if all == nil {
			err = verdicts[i]
		}
		if err != nil {
			span.SetStatus(codes.Error, err.Error())
		}
		span.End()
	}
}
