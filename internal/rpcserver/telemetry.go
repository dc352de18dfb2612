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

// Telemetry returns the interceptor that measures calls and continues the trace of the caller. It goes in front of Interceptors, so that the
// access log is within the trace and the status is the one that the caller sees.
//
// The caller's trace is trusted: the span is its child and is sampled if the caller's is, for one trace is to lead from the click to the
// effect. At the edge to strangers let the proxy drop their traceparent: they could have everything recorded.
//
// Health checks and reflection are left out. They come all day and say nothing.
func Telemetry(meters metric.MeterProvider, tracers trace.TracerProvider) connect.ServerInterceptor {
	interceptor, err := otelconnect.NewServerInterceptor(
		otelconnect.WithMeterProvider(meters), otelconnect.WithTracerProvider(tracers),
		otelconnect.WithPropagator(propagation.TraceContext{}), otelconnect.WithTrustRemote(),
		otelconnect.WithFilter(func(_ context.Context, spec connect.Spec) bool { return !isInfrastructure(spec.Procedure) }),
	)
	if err != nil {
		panic("rpcserver: telemetry: " + err.Error()) // wrong names of instruments; they are constants
	}
	return interceptor
}

// traceHeaders are what a caller that traces sends. Telemetry reads the trace; baggage is not looked at, and a browser that sends it must not be refused.
var traceHeaders = propagation.NewCompositeTextMapPropagator(propagation.TraceContext{}, propagation.Baggage{})

func isInfrastructure(procedure string) bool {
	return strings.HasPrefix(procedure, "/grpc.health.") || strings.HasPrefix(procedure, "/grpc.reflection.")
}
