package outbox

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"example.com/shop/internal/dev/testenv"
	"example.com/shop/internal/messaging"
	"example.com/shop/internal/postgres"
	"github.com/jackc/pgx/v5"
	"go.opentelemetry.io/otel/codes"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
	"go.opentelemetry.io/otel/trace"
)

// Each try to publish a message is a child span of the insert, with the verdict. The published copy carries that span's
// context, and the row stays unchanged.
func TestPublishingIsTraced(t *testing.T) {
	t.Parallel()
	db := testenv.Postgres(t)
	recorder := tracetest.NewSpanRecorder()
	provider := sdktrace.NewTracerProvider(sdktrace.WithSpanProcessor(recorder))
	ctx, call := provider.Tracer("test").Start(t.Context(), "call")
	err := postgres.Transact(ctx, db, func(tx pgx.Tx) error { return Insert(ctx, tx, probe("", "traced")) })
	if err != nil {
		t.Fatal(err)
	}
	call.End()
	insert(t, db, "", "untraced")
	var stored string
	const parentSQL = `SELECT headers ->> 'traceparent' FROM outbox WHERE headers <> '{}'`
	if err := db.QueryRow(t.Context(), parentSQL).Scan(&stored); err != nil {
		t.Fatal(err)
	}
	b := newBroker(0)
	tries := 0
	b.verdict = func(text string, _ []string) error {
		if text == "traced" {
			if tries++; tries == 1 {
				return messaging.ErrNacked
			}
		}
		return nil
	}
	start(t, db, b, Config{PollInterval: 10 * time.Millisecond, TracerProvider: provider})
	var publishes []sdktrace.ReadOnlySpan
	testenv.Eventually(t, 20*time.Second, func() error {
		publishes = nil
		for _, span := range recorder.Ended() {
			if span.Name() == "publish google.protobuf.StringValue" {
				publishes = append(publishes, span)
			}
		}
		if len(publishes) < 2 {
			return fmt.Errorf("%d spans", len(publishes))
		}
		return nil
	})
	equal(t, "tries", len(publishes), 2)
	created := recorder.Ended()[0]
	equal(t, "first to end", created.Name(), "create google.protobuf.StringValue")
	equal(t, "above the insert", created.Parent().SpanID(), call.SpanContext().SpanID())
	equal(t, "in the row", stored,
		"00-"+created.SpanContext().TraceID().String()+"-"+created.SpanContext().SpanID().String()+"-01")
	for i, want := range []codes.Code{codes.Error, codes.Unset} {
		equal(t, "above the publishing", publishes[i].Parent().SpanID(), created.SpanContext().SpanID())
		equal(t, "verdict", publishes[i].Status().Code, want)
		equal(t, "kind", publishes[i].SpanKind(), trace.SpanKindProducer)
	}
	var after string
	if err := db.QueryRow(t.Context(), parentSQL).Scan(&after); err != nil {
		t.Fatal(err)
	}
	equal(t, "in the row afterwards", after, stored)
}

// Without a tracer, and for a message whose trace is not recorded, the relay makes no span and changes no header.
func TestUntracedMessagesAreLeftAlone(t *testing.T) {
	t.Parallel()
	const notSampled = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00"
	message := probe("", "x")
	message.Headers = map[string]string{"traceparent": strings.Replace(notSampled, "-00", "-01", 1)}
	equal(t, "spans without tracer", len(newSpanMaker(nil).start(t.Context(), []messaging.Message{message})), 0)
	message.Headers["traceparent"] = notSampled
	spans := newSpanMaker(sdktrace.NewTracerProvider()).start(t.Context(), []messaging.Message{message})
	equal(t, "spans of an unsampled message", len(spans), 0)
	equal(t, "header", message.Headers["traceparent"], notSampled)
}

// A caller's trace cannot make a message invalid.
func TestATraceThatHasNoRoomIsLeftOut(t *testing.T) {
	t.Parallel()
	var state trace.TraceState
	for _, key := range []string{"a", "b", "c", "d", "e"} {
		state, _ = state.Insert(key, strings.Repeat("v", 250))
	}
	ctx := trace.ContextWithSpanContext(t.Context(), trace.NewSpanContext(trace.SpanContextConfig{
		TraceID: trace.TraceID{1}, SpanID: trace.SpanID{2}, TraceState: state,
	}))
	headers := withTrace(ctx, nil)
	equal(t, "headers", len(headers), 1)
	equal(t, "traceparent is kept", headers["traceparent"] != "", true)
	full := map[string]string{}
	for _, c := range "abcdefghijklmnopqrstuvwxyzABCDEF" {
		full["h"+strings.ToLower(string(c))+strings.Repeat("x", int(c)%7)] = ""
	}
	equal(t, "headers of a full message", len(withTrace(ctx, full)), len(full))
}
