package rpcserver

import (
	"context"
	"strings"

	"connectrpc.com/connect/v2"
	"connectrpc.com/otelconnect"
	"go.opentelemetry.io/otel/metric"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/trace"
)

// Telemetry returns the interceptor that measures calls and continues the trace of the caller. It must come before
// Interceptors, so that the access log is within the trace and the span has the status that the caller sees.
//
// Telemetry trusts the caller's trace: the span is its child, and is sampled if the caller's span is. So one trace
// leads from the click to the effect. At a public edge, the proxy should drop the traceparent of strangers, who could
// otherwise have every call recorded.
//
// Health checks and reflection are not traced: they are frequent and of no interest.
func Telemetry(meters metric.MeterProvider, tracers trace.TracerProvider) connect.ServerInterceptor {
	interceptor, err := otelconnect.NewServerInterceptor(
		otelconnect.WithMeterProvider(meters), otelconnect.WithTracerProvider(tracers),
		otelconnect.WithPropagator(propagation.TraceContext{}), otelconnect.WithTrustRemote(),
		otelconnect.WithFilter(func(_ context.Context,
			spec connect.Spec) bool {
			return !isInfrastructure(spec.Procedure)
		}),
	)
	if err != nil {
		panic("rpcserver: telemetry: " + err.Error()) // cannot happen: the names of instruments are valid constants
	}
	return interceptor
}

// traceHeaders are the headers that tracing callers send. Telemetry reads the trace and ignores the baggage. CORS
// must still accept baggage, so that browsers that send it are not refused.
var traceHeaders = propagation.NewCompositeTextMapPropagator(propagation.TraceContext{}, propagation.Baggage{})

func isInfrastructure(procedure string) bool {
	return strings.HasPrefix(procedure, "/grpc.health.") || strings.HasPrefix(procedure, "/grpc.reflection.")
}
