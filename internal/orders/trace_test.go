package orders_test

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect/v2"
	"connectrpc.com/connect/v2/connecthttp"
	"connectrpc.com/otelconnect"
	"example.com/shop/internal/app"
	"example.com/shop/internal/dev/testenv"
	ordersv1 "example.com/shop/internal/gen/orders/v1"
	"example.com/shop/internal/gen/orders/v1/ordersv1connect"
	"github.com/google/uuid"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/sdk/resource"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/trace"
)

// collector is an in-memory exporter for the spans of several processes.
type collector struct {
	mu    sync.Mutex
	spans []sdktrace.ReadOnlySpan
}

func (c *collector) ExportSpans(_ context.Context, spans []sdktrace.ReadOnlySpan) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.spans = append(c.spans, spans...)
	return nil
}

func (c *collector) Shutdown(context.Context) error { return nil }

// child finds a span by its parent, process and kind, and by its name or a part of its SQL. The span may be below the
// span of a batch of statements.
func (c *collector) child(
	parent trace.SpanContext, process string, kind trace.SpanKind, name string,
) (sdktrace.ReadOnlySpan, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	i := slices.IndexFunc(c.spans, func(s sdktrace.ReadOnlySpan) bool {
		service, _ := s.Resource().Set().Value("service.name")
		below := func(id trace.SpanID) bool { return id == parent.SpanID() }
		return (below(s.Parent().SpanID()) || slices.ContainsFunc(c.spans, func(batch sdktrace.ReadOnlySpan) bool {
			return batch.Name() == "batch start" && batch.SpanContext().SpanID() == s.Parent().SpanID() &&
				below(batch.Parent().SpanID())
		})) && s.SpanContext().TraceID() == parent.TraceID() && service.AsString() == process &&
			s.SpanKind() == kind && (s.Name() == name || strings.Contains(sqlOf(s), name))
	})
	if i < 0 {
		var all []string
		for _, s := range c.spans {
			all = append(all, fmt.Sprintf("%s (%s)", s.Name(), s.Parent().SpanID()))
		}
		return nil, fmt.Errorf("no span %q of %s below %s; there are %s", name, process, parent.SpanID(), all)
	}
	return c.spans[i], nil
}

func sqlOf(s sdktrace.ReadOnlySpan) string {
	for _, attr := range s.Attributes() {
		if attr.Key == "db.query.text" {
			return attr.Value.AsString()
		}
	}
	return ""
}

// startProcess runs a process until the test ends, and returns its URL.
func startProcess(t *testing.T, run func(context.Context, app.Config) error, config app.Config) (url string) {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	config.Addr = listener.Addr().String()
	_ = listener.Close() // so that the process can listen on the address
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() {
		if err := run(ctx, config); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(func() { cancel(); running.Wait() })
	return "http://" + config.Addr
}

// One trace leads from the client's call through insert, publish and process to the effect, and continues through the
// message that the handler inserted. It spans four processes and a real broker.
func TestOneTraceFromCallToEffect(t *testing.T) {
	t.Parallel()
	spans := &collector{}
	config := app.Config{
		PostgresURL: testenv.PostgresURL(t), AMQPURL: testenv.AMQP(t), Exchange: "events", Spans: spans,
		Edge: app.Edge{NoAuth: true},
	}
	url := startProcess(t, app.RunAPI, config)
	startProcess(t, app.RunRelay, config)
	startProcess(t, app.RunConsumer, config)

	const caller = "caller"
	provider := sdktrace.NewTracerProvider(sdktrace.WithSyncer(spans),
		sdktrace.WithResource(resource.NewSchemaless(attribute.String("service.name", caller))))
	traced, err := otelconnect.NewClientInterceptor(otelconnect.WithTracerProvider(provider),
		otelconnect.WithPropagator(propagation.TraceContext{}), otelconnect.WithoutMetrics())
	if err != nil {
		t.Fatal(err)
	}
	web := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	client := ordersv1connect.NewOrderServiceClient(connect.NewClient(connecthttp.NewTransport(web, url), traced))
	ctx, click := provider.Tracer("test").Start(t.Context(), "click")
	const customer = "a-customer-of-ours"
	testenv.Eventually(t, 20*time.Second, func() error {
		_, err := client.SetStock(t.Context(), &ordersv1.SetStockRequest{Sku: "apple", Total: 5})
		return err
	})
	_, err = client.PlaceOrder(ctx, &ordersv1.PlaceOrderRequest{
		OrderId: uuid.NewString(), CustomerId: customer, Lines: []*ordersv1.Line{{Sku: "apple", Quantity: 1}},
	})
	if err != nil {
		t.Fatal(err)
	}
	click.End()

	const api, relay, consumer = "shop-api", "shop-relay", "shop-consumer"
	at := click.SpanContext()
	for _, step := range []struct {
		process string
		kind    trace.SpanKind
		name    string
		sibling bool // the next step is not a child of this span, but a sibling
	}{
		{caller, trace.SpanKindClient, "orders.v1.OrderService/PlaceOrder", false},
		{api, trace.SpanKindServer, "orders.v1.OrderService/PlaceOrder", false},
		{api, trace.SpanKindClient, "INSERT INTO orders", true},
		{api, trace.SpanKindClient, "outbox_message", true}, // with COMMIT
		{api, trace.SpanKindProducer, "create orders.v1.OrderPlaced", false},
		{relay, trace.SpanKindProducer, "publish orders.v1.OrderPlaced", false},
		{consumer, trace.SpanKindConsumer, "process orders.v1.OrderPlaced", false},
		{consumer, trace.SpanKindClient, "INSERT INTO reservations", true},
		{consumer, trace.SpanKindProducer, "create orders.v1.OrderConfirmed", false},
		{relay, trace.SpanKindProducer, "publish orders.v1.OrderConfirmed", false},
		{consumer, trace.SpanKindConsumer, "process orders.v1.OrderConfirmed", false},
		{consumer, trace.SpanKindClient, "INSERT INTO notifications", true},
	} {
		var found sdktrace.ReadOnlySpan
		testenv.Eventually(t, 30*time.Second, func() (err error) {
			found, err = spans.child(at, step.process, step.kind, step.name)
			return err
		})
		if !step.sibling {
			at = found.SpanContext()
		}
	}
	spans.mu.Lock()
	defer spans.mu.Unlock()
	for _, s := range spans.spans {
		if slices.ContainsFunc(s.Attributes(), func(a attribute.KeyValue) bool {
			return strings.Contains(a.Value.String(), customer)
		}) {
			t.Errorf("span %s contains an argument: %v", s.Name(), s.Attributes())
		}
	}
}
