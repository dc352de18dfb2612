package inbox

import (
	"context"
	"slices"
	"sync"
	"testing"
	"time"

	"example.com/shop/internal/dev/testenv"
	"example.com/shop/internal/messaging"
	"example.com/shop/internal/outbox"
	"github.com/jackc/pgx/v5"
	"go.opentelemetry.io/otel/codes"
	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// Every metric changes when its event happens.
func TestMetrics(t *testing.T) {
	t.Parallel()
	b := setup(t)
	reader := sdkmetric.NewManualReader()
	config := eager
	config.MeterProvider = sdkmetric.NewMeterProvider(sdkmetric.WithReader(reader))
	config.PollInterval = time.Hour
	box := b.inbox(config)
	want := func(want map[string]float64) {
		t.Helper()
		got := testenv.Metrics(t, reader)
		for name, value := range want {
			if got[name] != value {
				t.Errorf("%s is %v, want %v; all: %v", name, got[name], value, got)
			}
		}
	}
	good, bad, behind, broken := probe("", "one"), probe("k", "bad"), probe("k", "behind"), probe("", "broken")
	b.on("bad", fails)
	nameless := probe("", "nameless")
	nameless.ID = ""
	process(t, box, good, good, bad, behind, nameless)
	process(t, box, good)
	broken.Count = maxBreaks
	process(t, box, broken)
	want(map[string]float64{
		"inbox.applied{group}": 1, "inbox.duplicates{group}": 2, "inbox.retries{group}": 1, "inbox.crashes{group}": 1,
		"inbox.dead_letters{groupno_id}": 1,
	})
	ctx, cancel := context.WithCancel(t.Context())
	stop := box.observeRetries(time.Nanosecond)
	want(map[string]float64{"inbox.retrying{group}": 3, "inbox.blocked_keys{group}": 1})
	if blocked := testenv.Metrics(t, reader)["inbox.blocked{group}"]; blocked <= 0 {
		t.Errorf("the key has been blocked for %v s", blocked)
	}
	retryAll(t, box)
	want(map[string]float64{
		"inbox.retrying{group}": 0, "inbox.blocked_keys{group}": 0, "inbox.blocked{group}": 0,
		"inbox.applied{group}": 3, "inbox.retries{group}": 2, "inbox.dead_letters{groupexhausted}": 1,
	})
	stop()
	if n := testenv.Metrics(t, reader)["inbox.handler.duration{group}"]; n < 5 {
		t.Errorf("%v runs of handlers", n)
	}
	var running sync.WaitGroup
	running.Go(func() { _ = box.Run(ctx) })
	testenv.Eventually(t, 10*time.Second, func() error {
		if _, there := testenv.Metrics(t, reader)["inbox.retrying{group}"]; !there {
			return errProbe
		}
		return nil
	})
	cancel()
	running.Wait()
}

// The handler's span continues the trace of the message, and the messages that the handler inserts into the outbox
// continue the handler's.
func TestHandlersAreTraced(t *testing.T) {
	t.Parallel()
	b := setup(t)
	spans := tracetest.NewSpanRecorder()
	provider := sdktrace.NewTracerProvider(sdktrace.WithSpanProcessor(spans))
	config := eager
	config.TracerProvider = provider
	box := b.inbox(config)
	const parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
	good := probe("", "one")
	good.Headers["traceparent"] = parent
	b.on("one", func(ctx context.Context, tx pgx.Tx) error {
		return outbox.Insert(ctx, tx, messaging.New("", wrapperspb.String("next")))
	})
	bad := probe("", "bad")
	b.on("bad", fails)
	process(t, box, good, bad)
	ended := spans.Ended()
	i := slices.IndexFunc(ended, func(s sdktrace.ReadOnlySpan) bool {
		return s.Parent().SpanID().String() == "b7ad6b7169203331" && s.Status().Code != codes.Error
	})
	if i < 0 {
		t.Fatalf("no span continues the trace: %v", ended)
	}
	span := ended[i]
	if span.SpanContext().TraceID().String() != "0af7651916cd43dd8448eb211c80319c" ||
		span.Name() != "process google.protobuf.StringValue" {
		t.Errorf("span %s of trace %s", span.Name(), span.SpanContext().TraceID())
	}
	if !slices.ContainsFunc(ended, func(s sdktrace.ReadOnlySpan) bool { return s.Status().Code == codes.Error }) {
		t.Error("no span records the failure")
	}
	var stored string
	if err := b.db.QueryRow(t.Context(), `SELECT headers ->> 'traceparent' FROM outbox`).Scan(&stored); err != nil {
		t.Fatal(err)
	}
	want := "00-" + span.SpanContext().TraceID().String()
	if len(stored) < len(want) || stored[:len(want)] != want || stored == parent {
		t.Errorf("the inserted message has traceparent %q", stored)
	}
}
