package rabbitrpc_test

import (
	"context"
	"errors"
	"fmt"
	"math"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect/v2"
	"example.com/shop/internal/dev/testenv"
	"example.com/shop/internal/rabbitrpc"
	amqp "github.com/rabbitmq/amqp091-go"
	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
	"go.opentelemetry.io/otel/trace"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// Two services, many clients, and thousands of calls in flight on one client: every call gets its own answer.
func TestManyCalls(t *testing.T) {
	t.Parallel()
	url := testenv.AMQP(t)
	const clients, calls, inFlight = 20, 50, 3000
	serve(t, rabbitrpc.ServerConfig{URL: url}, register(again, echo), register(other, echo))
	var all pending
	for c := range clients {
		client := newClient(t, url)
		for i := range calls {
			spec := again
			if i%2 == 0 {
				spec = other
			}
			all.call(t.Context(), client, spec, fmt.Sprintf("%d/%d", c, i))
		}
	}
	busy := newClient(t, url)
	for i := range inFlight {
		all.call(t.Context(), busy, again, fmt.Sprint("busy/", i))
	}
	if err := errors.Join(all.wait()...); err != nil {
		t.Error(err)
	}
}

// The calls in flight are bounded, and every call that ends makes room, even a canceled one.
func TestCallsInFlightAreBounded(t *testing.T) {
	t.Parallel()
	url := testenv.AMQP(t)
	const limit = 5
	begun, proceed := make(chan struct{}, limit), make(chan struct{})
	serve(t, rabbitrpc.ServerConfig{URL: url}, register(once, func(ctx context.Context, in string) (string, error) {
		begun <- struct{}{}
		<-proceed
		return in, nil
	}))
	client := connect.NewClient(newTransport(t, rabbitrpc.TransportConfig{URL: url, MaxInFlight: limit}))
	ctx, leave := context.WithCancel(t.Context())
	var staying, leaving pending
	for range limit - 1 {
		staying.call(t.Context(), client, once, "hello")
	}
	leaving.call(ctx, client, once, "hello")
	for range limit {
		receive(t, begun)
	}
	_, err := call(t.Context(), client, once, "one too many")
	wantError(t, err, connect.CodeResourceExhausted, "the maximum of 5 calls is in flight; nothing was sent")
	leave()
	leaving.wait()
	close(proceed)
	if _, err := call(t.Context(), client, once, "hello"); err != nil {
		t.Error(err)
	}
	if err := errors.Join(staying.wait()...); err != nil {
		t.Error(err)
	}
}

func TestStreamsAreRefused(t *testing.T) {
	t.Parallel()
	_, err := newClient(t, "amqp://127.0.0.1:1/").CallServerStream(t.Context(), stream, wrapperspb.String(""))
	wantError(t, err, connect.CodeUnimplemented, "")
}

// A call without a deadline gets one, so a server that never answers cannot block it indefinitely.
func TestCallsWithoutDeadlineGetOne(t *testing.T) {
	t.Parallel()
	b := &testbed{t: t, direct: testenv.AMQP(t)}
	asked := make(chan *amqp.Delivery, 1)
	b.answerWith(t, func(_ *amqp.Channel, request *amqp.Delivery) { asked <- request })
	const timeout = time.Second
	client := connect.NewClient(newTransport(t, rabbitrpc.TransportConfig{URL: b.direct, Timeout: timeout}))
	// A first call with its own deadline connects, so that the timeout does not cover connecting.
	connected, leave := context.WithTimeout(t.Context(), patience)
	var first pending
	first.call(connected, client, once, "")
	receive(t, asked)
	leave()
	first.wait()
	_, err := call(t.Context(), client, once, "")
	wantError(t, err, connect.CodeDeadlineExceeded, "")
	request := receive(t, asked)
	left, err := strconv.Atoi(request.Expiration)
	if len(request.CorrelationId) != 32 || err != nil || left < 1 || left > int(timeout.Milliseconds()) {
		t.Errorf("correlation %q, expiration %q (%v)", request.CorrelationId, request.Expiration, err)
	}
}

// While the broker is unavailable, calls fail at once and report that nothing was sent. They succeed once it is back.
func TestBrokerUnavailable(t *testing.T) {
	t.Parallel()
	url := testenv.AMQP(t)
	serve(t, rabbitrpc.ServerConfig{URL: url}, register(once, echo))
	proxy, proxied := testenv.ProxyURL(t, url)
	proxy.Refuse(true)
	client := newClient(t, proxied)
	var all pending
	for range 50 {
		all.call(t.Context(), client, once, "")
	}
	for _, err := range all.wait() {
		wantError(t, err, connect.CodeUnavailable, "the broker is unavailable; nothing was sent")
	}
	proxy.Refuse(false)
	testenv.Eventually(t, patience, func() error {
		_, err := call(t.Context(), client, once, "")
		return err
	})
}

// A network that hangs blocks no call beyond its context, at any stage.
func TestFrozenNetworkBlocksNoCall(t *testing.T) {
	t.Parallel()
	url := testenv.AMQP(t)
	serve(t, rabbitrpc.ServerConfig{URL: url}, register(once, echo))
	proxy, proxied := testenv.ProxyURL(t, url)
	proxy.Freeze(true)
	transport := newTransport(t, rabbitrpc.TransportConfig{URL: proxied})
	client := connect.NewClient(transport)
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	_, err := call(ctx, client, once, "while connecting")
	wantError(t, err, connect.CodeDeadlineExceeded, "")
	proxy.Freeze(false)
	if _, err := call(t.Context(), client, once, "back"); err != nil {
		t.Fatal(err)
	}
	proxy.Freeze(true)
	var all pending
	ctx, cancel = context.WithTimeout(t.Context(), 500*time.Millisecond)
	defer cancel()
	for range 200 { // exceeds all buffers on the way
		all.call(ctx, client, once, strings.Repeat("x", 100<<10))
	}
	for _, err := range all.wait() {
		wantError(t, err, connect.CodeDeadlineExceeded, "")
	}
}

func TestCloseEndsCalls(t *testing.T) {
	t.Parallel()
	url := testenv.AMQP(t)
	begun, proceed := make(chan struct{}), make(chan struct{})
	serve(t, rabbitrpc.ServerConfig{URL: url}, register(once, func(context.Context, string) (string, error) {
		close(begun)
		<-proceed
		return "", nil
	}))
	defer close(proceed)
	transport := newTransport(t, rabbitrpc.TransportConfig{URL: url})
	client := connect.NewClient(transport)
	var all pending
	all.call(t.Context(), client, once, "")
	receive(t, begun)
	var closing sync.WaitGroup
	for range 2 {
		closing.Go(func() { _ = transport.Close() })
	}
	closing.Wait()
	wantError(t, all.wait()[0], connect.CodeUnavailable, "connection to the broker lost; outcome unknown")
	_, err := call(t.Context(), client, once, "")
	wantError(t, err, connect.CodeUnavailable, "the client is closed")
}

// Metadata that no AMQP frame can carry, or that HTTP would refuse, fails its own call and no other on the connection.
func TestMetadataIsBounded(t *testing.T) {
	t.Parallel()
	url := testenv.AMQP(t)
	const half = 50_000
	answers := map[string]func(*connect.CallInfo){
		"big trailer": func(i *connect.CallInfo) { i.ResponseTrailer().Set("Big", strings.Repeat("x", 200<<10)) },
		"both": func(i *connect.CallInfo) {
			i.ResponseHeader().Set("A", strings.Repeat("x", half))
			i.ResponseTrailer().Set("B", strings.Repeat("x", half))
		},
		"many values":     func(i *connect.CallInfo) { i.ResponseHeader().SetValues("Many", make([]string, 30_000)) },
		"forged header":   func(i *connect.CallInfo) { i.ResponseHeader().Set("Line", "a\r\nb: c") },
		"forged trailer":  func(i *connect.CallInfo) { i.ResponseTrailer().Set("two words", "") },
		"large but valid": func(i *connect.CallInfo) { i.ResponseHeader().Set("A", strings.Repeat("x", 65_000)) },
		"many but valid":  func(i *connect.CallInfo) { i.ResponseHeader().SetValues("Many", make([]string, 1024)) },
		"no metadata":     func(*connect.CallInfo) {},
	}
	codes := map[string]connect.Code{
		"big trailer": connect.CodeResourceExhausted, "both": connect.CodeResourceExhausted,
		"many values": connect.CodeResourceExhausted, "forged header": connect.CodeInternal,
		"forged trailer": connect.CodeInternal,
	}
	begun, release := make(chan struct{}), make(chan struct{})
	serve(t, rabbitrpc.ServerConfig{URL: url}, register(once, func(ctx context.Context, in string) (string, error) {
		if in == "other" {
			close(begun)
			<-release
			return in, nil
		}
		info, _ := connect.CallInfoForServerContext(ctx)
		answers[in](info)
		return in, nil
	}))
	client := newClient(t, url)
	other := make(chan error, 1)
	go func() {
		_, err := call(t.Context(), client, once, "other")
		other <- err
	}()
	receive(t, begun)
	for in := range answers {
		_, err := call(t.Context(), client, once, in)
		if want := codes[in]; want != 0 || err != nil {
			wantError(t, err, want, "")
		}
	}
	for name, want := range map[string]connect.Code{
		"Big": connect.CodeResourceExhausted, strings.Repeat("N", 300): connect.CodeResourceExhausted,
		"Many": connect.CodeResourceExhausted, ":path": connect.CodeInvalidArgument,
		"two words": connect.CodeInvalidArgument, "Line": connect.CodeInvalidArgument,
	} {
		ctx, info := connect.NewClientContext(t.Context())
		info.RequestHeader().SetValues(name, map[string][]string{
			"Big": {strings.Repeat("x", 200<<10)}, "Many": make([]string, 30_000), "Line": {"a\r\nb: c"},
		}[name])
		if info.RequestHeader().Get(name) == "" && name != "Many" {
			info.RequestHeader().Set(name, "value")
		}
		_, err := call(ctx, client, once, "no metadata")
		wantError(t, err, want, "")
	}
	close(release)
	if err := receive(t, other); err != nil {
		t.Errorf("another call on the same connections failed: %v", err)
	}
}

// A deadline beyond the range of the broker's timer is cut to that range.
func TestFarDeadlines(t *testing.T) {
	t.Parallel()
	url := testenv.AMQP(t)
	var left time.Duration
	serve(t, rabbitrpc.ServerConfig{URL: url}, register(once, func(ctx context.Context, in string) (string, error) {
		deadline, _ := ctx.Deadline()
		left = time.Until(deadline)
		return in, nil
	}))
	client := newClient(t, url)
	const day = 24 * time.Hour
	for _, timeout := range []time.Duration{23 * day, 30 * day, 200 * 365 * day, math.MaxInt64} {
		ctx, cancel := context.WithTimeout(t.Context(), timeout)
		if _, err := call(ctx, client, once, ""); err != nil {
			t.Errorf("%v: %v", timeout, err)
		}
		if most := 24 * day; left > most || left < min(timeout, most)-time.Minute {
			t.Errorf("%v: the server has %v left", timeout, left)
		}
		cancel()
	}
	for _, expiration := range []string{"2147483648", "4294967295"} { // other clients may send up to the broker's limit
		request := rawRequest(t, "")
		request.Type, request.Expiration = once.Procedure, expiration
		request.Headers["deadline"] = int64(math.MaxInt64)
		if reply := receive(t, ask(t, url, request)); reply.Type != "answer" {
			t.Errorf("expiration %s: %s %q", expiration, reply.Type, reply.Body)
		}
	}
}

// Each metric changes when its event happens. A call is one trace: the spans of the caller, the client, the server
// and the handler.
func TestTelemetry(t *testing.T) {
	t.Parallel()
	b := &testbed{t: t, direct: testenv.AMQP(t)}
	reader, spans := sdkmetric.NewManualReader(), tracetest.NewSpanRecorder()
	meters := sdkmetric.NewMeterProvider(sdkmetric.WithReader(reader))
	tracers := sdktrace.NewTracerProvider(sdktrace.WithSpanProcessor(spans))
	seen := make(chan trace.SpanContext, 3)
	serverConfig := rabbitrpc.ServerConfig{URL: b.direct, MeterProvider: meters, TracerProvider: tracers}
	serve(t, serverConfig, register(again, func(ctx context.Context, in string) (string, error) {
		seen <- trace.SpanContextFromContext(ctx)
		// The call "twice" may have been answered by the other queue already.
		during := testenv.Metrics(t, reader)
		server, client := during["rabbitrpc.server.in_flight{}"], during["rabbitrpc.client.in_flight{}"]
		if in != "twice" && (server != 1 || client != 1) {
			t.Errorf("while a call is in flight: %v", during)
		}
		if in == "fail" {
			return "", connect.NewError(connect.CodeNotFound, "")
		}
		return in, nil
	}))
	clientConfig := rabbitrpc.TransportConfig{URL: b.direct, MeterProvider: meters, TracerProvider: tracers}
	client := connect.NewClient(newTransport(t, clientConfig))
	ctx, span := tracers.Tracer("test").Start(t.Context(), "caller")
	if _, err := call(ctx, client, again, "hello"); err != nil {
		t.Fatal(err)
	}
	if got := receive(t, seen); got.TraceID() != span.SpanContext().TraceID() {
		t.Errorf("the handler's trace is %s, the caller's %s", got.TraceID(), span.SpanContext().TraceID())
	}
	parents := map[trace.SpanKind]trace.SpanID{}
	ids := map[trace.SpanKind]trace.SpanID{}
	for _, ended := range spans.Ended() {
		parents[ended.SpanKind()], ids[ended.SpanKind()] = ended.Parent().SpanID(), ended.SpanContext().SpanID()
	}
	clientParent, serverParent := parents[trace.SpanKindClient], parents[trace.SpanKindServer]
	if clientParent != span.SpanContext().SpanID() || serverParent != ids[trace.SpanKindClient] {
		t.Errorf("spans %v have the parents %v", ids, parents)
	}
	_, err := call(ctx, client, again, "fail")
	wantError(t, err, connect.CodeNotFound, "")
	b.answerWith(t, func(channel *amqp.Channel, request *amqp.Delivery) { answer(t, channel, request, "second") })
	if _, err := call(ctx, client, again, "twice"); err != nil { // both the server and the other queue answer
		t.Fatal(err)
	}
	testenv.Eventually(t, patience, func() error {
		got := testenv.Metrics(t, reader)
		for name, want := range map[string]float64{
			"rabbitrpc.client.duration{ok" + again.Procedure + "}":        2,
			"rabbitrpc.client.duration{not_found" + again.Procedure + "}": 1,
			"rabbitrpc.server.duration{ok" + again.Procedure + "}":        2,
			"rabbitrpc.server.duration{not_found" + again.Procedure + "}": 1,
			"rabbitrpc.client.in_flight{}":                                0,
			"rabbitrpc.server.in_flight{}":                                0,
			"rabbitrpc.client.dropped{unexpected_reply}":                  1,
		} {
			if got[name] != want {
				return fmt.Errorf("%s is %v, want %v; all: %v", name, got[name], want, got)
			}
		}
		return nil
	})
}
