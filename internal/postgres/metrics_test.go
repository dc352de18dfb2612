package postgres

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"example.com/shop/internal/dev/testenv"
	sdk "go.opentelemetry.io/otel/sdk/metric"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
)

// Sample reads at most once per sampleAge, even if the read fails, however often Get is called.
func TestSample(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		reads := 0
		sample := Sample[int]{Read: func(context.Context) (int, error) {
			if reads++; reads == 2 {
				return 0, errors.New("database down")
			}
			return reads, nil
		}}
		for i, want := range []struct {
			value  int
			failed bool
		}{{1, false}, {0, true}, {3, false}} {
			for range 10 {
				if value, err := sample.Get(t.Context()); value != want.value || (err != nil) != want.failed {
					t.Errorf("%d: %d, %v", i, value, err)
				}
			}
			time.Sleep(sampleAge)
		}
		if reads != 3 {
			t.Errorf("read %d times", reads)
		}
	})
}

func TestPoolIsMeasured(t *testing.T) {
	t.Parallel()
	db := open(t, Config{URL: testenv.PostgresURL(t), MaxConns: 1})
	reader := sdk.NewManualReader()
	if err := ObservePool(db, "p", sdk.NewMeterProvider(sdk.WithReader(reader))); err != nil {
		t.Fatal(err)
	}
	conn, err := db.Acquire(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	release := sync.OnceFunc(conn.Release)
	t.Cleanup(release)
	metrics := testenv.Metrics(t, reader)
	if metrics["postgres.pool.connections{pused}"] != 1 || metrics["postgres.pool.limit{p}"] != 1 {
		t.Errorf("metrics are %v", metrics)
	}
	waits := metrics["postgres.pool.waits{p}"]
	done := make(chan error)
	go func() { done <- db.Ping(t.Context()) }()
	time.AfterFunc(50*time.Millisecond, release)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	metrics = testenv.Metrics(t, reader)
	if metrics["postgres.pool.waits{p}"] <= waits || metrics["postgres.pool.waited{p}"] <= 0 ||
		metrics["postgres.pool.connections{pidle}"] != 1 {
		t.Errorf("metrics are %v", metrics)
	}
}

// A statement within a trace has a span with its text but without its arguments. A statement outside a trace has none.
func TestStatementsAreTraced(t *testing.T) {
	t.Parallel()
	recorder := tracetest.NewSpanRecorder()
	provider := sdktrace.NewTracerProvider(sdktrace.WithSpanProcessor(recorder))
	db := open(t, Config{URL: testenv.PostgresURL(t), TracerProvider: provider})
	exec(t, db, `SELECT $1::text`, "outside")
	ctx, span := provider.Tracer("test").Start(t.Context(), "call")
	if _, err := db.Exec(ctx, `SELECT $1::text`, "an argument"); err != nil {
		t.Fatal(err)
	}
	span.End()
	text := ""
	for _, ended := range recorder.Ended() {
		if ended.SpanContext().TraceID() != span.SpanContext().TraceID() {
			t.Errorf("span %s is outside the trace", ended.Name())
		}
		text += fmt.Sprintln(ended.Name(), ended.Attributes())
	}
	if !strings.Contains(text, `SELECT $1::text`) || strings.Contains(text, "argument") {
		t.Errorf("spans: %s", text)
	}
}
