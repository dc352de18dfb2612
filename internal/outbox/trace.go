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

// A message's trace has three spans. The insert is "create", a child of the caller's span. Each try of the relay is
// "publish", a child of "create", possibly hours later. The consumer's is "process", a child of the "publish" whose
// copy it received. The context travels in the row's headers and in the AMQP headers, as W3C traceparent.

// startCreate starts the span of an insert, with the provider of ctx's span. If that span is not recorded, startCreate
// costs nothing.
func startCreate(ctx context.Context, messages []messaging.Message) (context.Context, trace.Span) {
	within := trace.SpanFromContext(ctx)
	if !within.IsRecording() {
		return ctx, noop.Span{}
	}
	attributes := []attribute.KeyValue{
		attribute.String("messaging.system", "rabbitmq"), attribute.String("messaging.operation.type", "create"),
	}
	if len(messages) == 1 {
		attributes = append(attributes, attribute.String("messaging.message.id", messages[0].ID.String()))
	} else {
		attributes = append(attributes, attribute.Int("messaging.batch.message_count", len(messages)))
	}
	return within.TracerProvider().Tracer(scope).Start(ctx, "create "+messages[0].Type,
		trace.WithSpanKind(trace.SpanKindProducer), trace.WithAttributes(attributes...))
}

// withTrace returns a copy of headers with the W3C trace context of ctx, or headers itself if ctx has none. The row
// stores the context because the relay publishes much later, in a process that has no access to the request. A caller's
// trace must not make a message invalid: withTrace leaves out a tracestate that is too long, since callers control it,
// and the whole context if the headers have no room for it.
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

// traceOf returns ctx with the trace context that a message carries.
func traceOf(ctx context.Context, headers map[string]string) context.Context {
	return propagation.TraceContext{}.Extract(ctx, propagation.MapCarrier(headers))
}

// spanMaker makes the "publish" spans. Without a provider it makes none, and reads no message.
type spanMaker struct{ tracer trace.Tracer }

func newSpanMaker(provider trace.TracerProvider) (m spanMaker) {
	if provider != nil {
		m.tracer = provider.Tracer(scope)
	}
	return m
}

// spans are the spans of a page's messages, by index among the messages sent. It is nil if none of them is recorded.
type spans map[int]trace.Span

// start starts a span for each message whose trace is recorded, and puts the span's context into the message's headers.
func (m spanMaker) start(ctx context.Context, messages []messaging.Message) (started spans) {
	if m.tracer == nil {
		return nil
	}
	for i := range messages {
		message := &messages[i]
		created := traceOf(ctx, message.Headers)
		if !trace.SpanContextFromContext(created).IsSampled() {
			continue
		}
		publishing, span := m.tracer.Start(created, "publish "+message.Type,
			trace.WithSpanKind(trace.SpanKindProducer), trace.WithAttributes(
				attribute.String("messaging.system", "rabbitmq"),
				attribute.String("messaging.operation.type", "send"),
				attribute.String("messaging.rabbitmq.destination.routing_key", message.Type),
				attribute.String("messaging.message.id", message.ID.String())))
		if started == nil {
			started = spans{}
		}
		started[i] = span
		message.Headers = maps.Clone(message.Headers) // keep the row's headers: it may be published again or parked
		propagation.TraceContext{}.Inject(publishing, propagation.MapCarrier(message.Headers))
	}
	return started
}

// end ends each span with its message's verdict. If all is not nil, there are no verdicts, and all spans end with it.
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
