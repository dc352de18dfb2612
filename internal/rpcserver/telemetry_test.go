package rpcserver_test

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect/v2/connecthttp"
	"example.com/shop/internal/dev/testenv"
	"example.com/shop/internal/rpcserver"
	"go.opentelemetry.io/otel/codes"
	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
	"go.opentelemetry.io/otel/trace"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
)

// Each call has a span, and is measured with the code that the caller gets. Health checks are neither traced nor
// measured.
func TestCallsAreTracedAndMeasured(t *testing.T) {
	t.Parallel()
	spans, reader := tracetest.NewSpanRecorder(), sdkmetric.NewManualReader()
	config := rpcserver.Config{
		TracerProvider: sdktrace.NewTracerProvider(sdktrace.WithSpanProcessor(spans)),
		MeterProvider:  sdkmetric.NewMeterProvider(sdkmetric.WithReader(reader)),
	}
	within := make(chan trace.SpanID, 3)
	server := serve(t, config, unary(func(ctx context.Context, in string) (string, error) {
		within <- trace.SpanContextFromContext(ctx).SpanID()
		switch in {
		case "bad":
			return "", errors.New("secret")
		case "panic":
			panic("secret")
		}
		return in, nil
	}))
	client := server.client(t, false, connecthttp.WithProtoJSON())
	for _, in := range []string{"good", "bad", "panic"} {
		_, _ = call(t.Context(), client, in)
	}
	if _, err := healthv1.NewHealthClient(server.grpc(t)).Check(t.Context(),
		&healthv1.HealthCheckRequest{}); err != nil {
		t.Fatal(err)
	}
	testenv.Eventually(t, 10*time.Second, func() error {
		if len(spans.Ended()) < 3 {
			return errors.New("not all spans have ended")
		}
		return nil
	})
	ended := spans.Ended()
	if len(ended) != 3 || ended[0].Name() != unarySpec.Procedure[1:] || ended[0].SpanKind() != trace.SpanKindServer {
		t.Fatalf("spans: %v", ended)
	}
	for _, span := range ended {
		if <-within != span.SpanContext().SpanID() {
			t.Error("the handler did not run within the span")
		}
	}
	for i, want := range []codes.Code{codes.Unset, codes.Error, codes.Error} {
		if got := ended[i].Status(); got.Code != want || got.Description != "" && got.Description != "internal error" {
			t.Errorf("span %d has status %v", i, got)
		}
	}
	total, internal := 0.0, 0.0
	metrics := testenv.Metrics(t, reader)
	for name, value := range metrics {
		if total += value; strings.Contains(strings.ToLower(name), "internal") {
			internal += value
		}
	}
	if total != 3 || internal != 2 {
		t.Errorf("got %v measured calls, %v of them internal errors: %v", total, internal, metrics)
	}
}
