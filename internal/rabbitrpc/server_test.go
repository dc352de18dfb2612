package rabbitrpc_test

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"connectrpc.com/connect/v2"
	"example.com/shop/internal/dev/testenv"
	"example.com/shop/internal/rabbitrpc"
	amqp "github.com/rabbitmq/amqp091-go"
	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// Replicas compete for calls and share them evenly.
func TestReplicasShareCalls(t *testing.T) {
	t.Parallel()
	url := testenv.AMQP(t)
	const calls, least, most = 300, 60, 141
	var served [3]atomic.Int64
	for i := range served {
		serve(t, rabbitrpc.ServerConfig{URL: url}, register(once, func(_ context.Context, in string) (string, error) {
			served[i].Add(1)
			return in, nil
		}))
	}
	client := newClient(t, url)
	for i := range calls {
		if _, err := call(t.Context(), client, once, fmt.Sprint(i)); err != nil {
			t.Fatal(err)
		}
	}
	total := int64(0)
	for i := range served {
		n := served[i].Load()
		if total += n; n < least || n > most {
			t.Errorf("replica %d served %d of %d calls", i, n, calls)
		}
	}
	if total != calls {
		t.Errorf("%d calls were executed %d times", calls, total)
	}
}

// A replica executes at most as many calls at once as its prefetch. Further calls wait in the queue.
func TestPrefetchBoundsWhatRunsAtOnce(t *testing.T) {
	t.Parallel()
	url := testenv.AMQP(t)
	const prefetch, calls = 3, 12
	var running, most atomic.Int64
	proceed := make(chan struct{})
	config := rabbitrpc.ServerConfig{URL: url, Prefetch: prefetch}
	serve(t, config, register(once, func(_ context.Context, in string) (string, error) {
		n := running.Add(1)
		defer running.Add(-1)
		for old := most.Load(); n > old && !most.CompareAndSwap(old, n); old = most.Load() {
		}
		<-proceed
		return in, nil
	}))
	client := newClient(t, url)
	var all pending
	for i := range calls {
		all.call(t.Context(), client, once, fmt.Sprint(i))
	}
	awaitWaiting(t, url, "probe.v1.Probe", calls-prefetch)
	close(proceed)
	if err := errors.Join(all.wait()...); err != nil {
		t.Error(err)
	}
	if most.Load() != prefetch {
		t.Errorf("%d calls ran at once, want %d", most.Load(), prefetch)
	}
}

func awaitWaiting(t *testing.T, url, service string, want int) {
	t.Helper()
	testenv.Eventually(t, patience, func() error {
		states, err := rabbitrpc.Look(t.Context(), url, service)
		if err == nil && states[0].Waiting != want {
			err = fmt.Errorf("%d requests wait, want %d", states[0].Waiting, want)
		}
		return err
	})
}

// Requests are not executed if they expire in the queue or arrive late at the server.
func TestExpiredRequestsAreNotExecuted(t *testing.T) {
	t.Parallel()
	url := testenv.AMQP(t)
	proceed, executed := make(chan struct{}), make(chan string, 10)
	config := rabbitrpc.ServerConfig{URL: url, Prefetch: 1}
	serve(t, config, register(again, func(_ context.Context, in string) (string, error) {
		executed <- in
		if in == "first" {
			<-proceed
		}
		return in, nil
	}))
	client := newClient(t, url)
	var first pending
	first.call(t.Context(), client, again, "first")
	receive(t, executed)
	short, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	_, err := call(short, client, again, "expired in the queue")
	wantError(t, err, connect.CodeDeadlineExceeded, "")
	late := rawRequest(t, "expired by the clock")
	late.Headers["deadline"] = time.Now().Add(-time.Millisecond).UnixMilli()
	replies := ask(t, url, late)
	awaitWaiting(t, url, "probe.v1.Probe", 1)
	close(proceed)
	if reply := receive(t, replies); reply.Type != "error" || !strings.Contains(string(reply.Body), "not executed") {
		t.Errorf("the late request was answered with %s %q", reply.Type, reply.Body)
	}
	if _, err := call(t.Context(), client, again, "last"); err != nil {
		t.Error(err)
	}
	if in := receive(t, executed); in != "last" {
		t.Errorf("%q was executed", in)
	}
	if err := errors.Join(first.wait()...); err != nil {
		t.Error(err)
	}
}

// rawRequest makes a request as the client does.
func rawRequest(t *testing.T, in string) *amqp.Publishing {
	return &amqp.Publishing{
		Type: again.Procedure, ContentType: "application/proto", CorrelationId: "raw",
		ReplyTo: "amq.rabbitmq.reply-to", Expiration: "20000",
		Headers: amqp.Table{"deadline": time.Now().Add(patience).UnixMilli()}, Body: encode(t, wrapperspb.String(in)),
	}
}

// ask publishes a request and returns the replies.
func ask(t *testing.T, url string, request *amqp.Publishing) <-chan amqp.Delivery {
	t.Helper()
	channel := raw(t, url)
	replies, err := channel.Consume("amq.rabbitmq.reply-to", "", true, false, false, false, nil)
	if err == nil {
		err = channel.Publish(rabbitrpc.DefaultExchange, "probe.v1.Probe", true, false, *request)
	}
	if err != nil {
		t.Fatal(err)
	}
	return replies
}

// A request that cannot be answered is dropped and counted, and the server continues.
func TestUnanswerableRequestsAreDropped(t *testing.T) {
	t.Parallel()
	url := testenv.AMQP(t)
	reader := sdkmetric.NewManualReader()
	var executed atomic.Int64
	serve(t, rabbitrpc.ServerConfig{URL: url, MeterProvider: sdkmetric.NewMeterProvider(sdkmetric.WithReader(reader))},
		register(again, func(_ context.Context, in string) (string, error) {
			executed.Add(1)
			return in, nil
		}))
	channel := raw(t, url)
	if _, err := channel.QueueDeclare("payments", false, false, false, false, nil); err != nil {
		t.Fatal(err)
	}
	for reason, ways := range map[string][]func(*amqp.Publishing){
		"no_reply_to": {
			func(p *amqp.Publishing) { p.ReplyTo = "" },
			func(p *amqp.Publishing) { *p = amqp.Publishing{} },
		},
		"foreign_reply_to": {
			func(p *amqp.Publishing) { p.ReplyTo = "payments" },
			func(p *amqp.Publishing) { p.ReplyTo = "amq.rabbitmq.reply-to-payments" },
		},
	} {
		for i, change := range ways {
			request := rawRequest(t, "bad")
			request.ReplyTo = "amq.rabbitmq.reply-to.garbage" // no client has this address
			change(request)
			if err := channel.Publish(rabbitrpc.DefaultExchange, "probe.v1.Probe", true, false, *request); err != nil {
				t.Fatal(err)
			}
			testenv.Eventually(t, patience, func() error {
				if got := testenv.Metrics(t, reader)["rabbitrpc.server.dropped{"+reason+"}"]; got != float64(i+1) {
					return fmt.Errorf("%v requests dropped as %s, want %d", got, reason, i+1)
				}
				return nil
			})
		}
	}
	// An address that is well-formed but leads nowhere does not stop the server either.
	nowhere := rawRequest(t, "answered to nobody")
	nowhere.ReplyTo = "amq.rabbitmq.reply-to.garbage"
	if err := channel.Publish(rabbitrpc.DefaultExchange, "probe.v1.Probe", true, false, *nowhere); err != nil {
		t.Fatal(err)
	}
	if out, err := call(t.Context(), newClient(t, url), again, "good"); err != nil || out != "good" {
		t.Errorf("got %q, %v", out, err)
	}
	if n := executed.Load(); n != 2 {
		t.Errorf("%d requests were executed, want 2", n)
	}
	queue, err := channel.QueueDeclarePassive("payments", false, false, false, false, nil)
	if err != nil || queue.Messages != 0 {
		t.Errorf("a foreign queue got %d messages, %v", queue.Messages, err)
	}
}

// A request that can be answered but not executed gets an error with the reason.
func TestRefusedRequestsAreAnswered(t *testing.T) {
	t.Parallel()
	url := testenv.AMQP(t)
	config := rabbitrpc.ServerConfig{URL: url, RequestMaxBytes: 100}
	serve(t, config, register(again, echo), register(stream, echo), register(other, echo))
	headers := func(value any) amqp.Table {
		return amqp.Table{"deadline": time.Now().Add(patience).UnixMilli(), "metadata": value}
	}
	single := func(name string, value any) amqp.Table { return headers(amqp.Table{name: []any{value}}) }
	long := strings.Repeat("x", 100<<10)
	empty := make([]any, 2000)
	for i := range empty {
		empty[i] = ""
	}
	for text, change := range map[string]func(*amqp.Publishing){
		"no correlation_id":                func(p *amqp.Publishing) { p.CorrelationId = "" },
		"header deadline is a <nil>":       func(p *amqp.Publishing) { p.Headers = nil },
		"header deadline is a string":      func(p *amqp.Publishing) { p.Headers["deadline"] = "soon" },
		"not a number of milliseconds":     func(p *amqp.Publishing) { p.Expiration = "" },
		"header metadata is a string":      func(p *amqp.Publishing) { p.Headers = headers("text") },
		`metadata "name" is a string`:      func(p *amqp.Publishing) { p.Headers = headers(amqp.Table{"name": "text"}) },
		`metadata "name" contains a int32`: func(p *amqp.Publishing) { p.Headers = single("name", int32(1)) },
		"65536 bytes":                      func(p *amqp.Publishing) { p.Headers = single("name", long) },
		"1024 values":                      func(p *amqp.Publishing) { p.Headers = headers(amqp.Table{"name": empty}) },
		`name ":path" is not`:              func(p *amqp.Publishing) { p.Headers = single(":path", "/") },
		`name "two words" is not`:          func(p *amqp.Publishing) { p.Headers = single("two words", "") },
		"broken has a value":               func(p *amqp.Publishing) { p.Headers = single("broken", "a\r\nb: c") },
		"nul has a value":                  func(p *amqp.Publishing) { p.Headers = single("nul", "a\x00") },
		"more than 8192 elements":          func(p *amqp.Publishing) { p.Headers = headers(slices.Repeat(empty, 5)) },
		"after its deadline":               func(p *amqp.Publishing) { p.Headers["deadline"] = int64(math.MinInt64) },
		"streams are not supported":        func(p *amqp.Publishing) { p.Type = stream.Procedure },
		// Of another service.
		"probe.v1.Probe has no such method": func(p *amqp.Publishing) { p.Type = other.Procedure },
		"content type":                      func(p *amqp.Publishing) { p.ContentType = "application/json" },
		"larger than":                       func(p *amqp.Publishing) { p.Body = make([]byte, 101) },
		"unmarshal":                         func(p *amqp.Publishing) { p.Body = []byte("\xff") },
	} {
		request := rawRequest(t, "")
		change(request)
		reply := receive(t, ask(t, url, request))
		refused := reply.Type == "error" && reply.CorrelationId == request.CorrelationId
		if !refused || !strings.Contains(string(reply.Body), text) {
			t.Errorf("want %q, got %s %q", text, reply.Type, reply.Body)
		}
	}
}

// If a replica is lost during a call of a method that may be repeated, another replica executes it, and the caller
// does not notice.
func TestIdempotentCallsAreTakenOver(t *testing.T) {
	t.Parallel()
	url := testenv.AMQP(t)
	proxy, proxied := testenv.ProxyURL(t, url)
	begun, ended := make(chan struct{}), make(chan struct{})
	serve(t, rabbitrpc.ServerConfig{URL: proxied}, register(again, func(ctx context.Context, _ string) (string, error) {
		close(begun)
		<-ctx.Done() // the connection is lost
		close(ended)
		return "", ctx.Err()
	}))
	var all pending
	all.call(t.Context(), newClient(t, url), again, "hello")
	receive(t, begun)
	serve(t, rabbitrpc.ServerConfig{URL: url}, register(again, echo))
	proxy.Refuse(true)
	proxy.Cut()
	if err := errors.Join(all.wait()...); err != nil {
		t.Error(err)
	}
	receive(t, ended)
}

// A drain answers the calls that were begun and leaves the others to the next replica.
func TestDrain(t *testing.T) {
	t.Parallel()
	url := testenv.AMQP(t)
	const calls = 20
	begun, proceed := make(chan struct{}, calls), make(chan struct{})
	config := rabbitrpc.ServerConfig{URL: url}
	leaving := serve(t, config, register(once, func(ctx context.Context, in string) (string, error) {
		begun <- struct{}{}
		<-proceed
		return in, ctx.Err()
	}))
	client := newClient(t, url)
	var all pending
	for i := range calls {
		all.call(t.Context(), client, once, fmt.Sprint(i))
	}
	for range calls {
		receive(t, begun)
	}
	leaving.cancel()
	awaitReplicas(t, url, "probe.v1.Probe", 0)
	_, err := call(t.Context(), client, once, "too late")
	wantError(t, err, connect.CodeUnavailable, "no replica serves probe.v1.Probe; nothing was done")
	serve(t, rabbitrpc.ServerConfig{URL: url}, register(once, echo))
	if _, err := call(t.Context(), client, once, "next"); err != nil {
		t.Errorf("during the drain: %v", err)
	}
	close(proceed)
	if err := errors.Join(all.wait()...); err != nil {
		t.Errorf("calls in flight: %v", err)
	}
	if err := leaving.stop(); err != nil {
		t.Errorf("Run: %v", err)
	}
}

func TestDrainTimeoutAbortsStuckCalls(t *testing.T) {
	t.Parallel()
	url := testenv.AMQP(t)
	begun, ended := make(chan struct{}), make(chan struct{})
	config := rabbitrpc.ServerConfig{URL: url, DrainTimeout: 50 * time.Millisecond}
	stuck := serve(t, config, register(once, func(ctx context.Context, _ string) (string, error) {
		close(begun)
		<-ctx.Done()
		close(ended)
		return "", ctx.Err()
	}))
	ctx, cancel := context.WithCancel(t.Context())
	var all pending
	all.call(ctx, newClient(t, url), once, "")
	receive(t, begun)
	if err := stuck.stop(); err == nil {
		t.Error("Run returned no error")
	}
	receive(t, ended)
	cancel()
	all.wait()
}

// The server recovers automatically after its connection is cut and after its queue is deleted.
func TestServerReconnects(t *testing.T) {
	t.Parallel()
	url := testenv.AMQP(t)
	proxy, proxied := testenv.ProxyURL(t, url)
	serve(t, rabbitrpc.ServerConfig{URL: proxied}, register(again, echo), register(other, echo))
	client := newClient(t, url)
	for name, disturb := range map[string]func(){
		"cut":           func() { proxy.Cut() },
		"queue deleted": func() { testenv.Management(t, url).DeleteQueue("probe.v1.Probe") },
	} {
		disturb()
		testenv.Eventually(t, patience, func() error {
			// A request that the lost connection had received is lost with the queue.
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			_, err := call(ctx, client, again, name)
			_, err2 := call(ctx, client, other, name)
			return errors.Join(err, err2)
		})
	}
}

func TestLookAndRates(t *testing.T) {
	t.Parallel()
	url := testenv.AMQP(t)
	serve(t, rabbitrpc.ServerConfig{URL: url}, register(again, echo))
	serve(t, rabbitrpc.ServerConfig{URL: url}, register(again, echo), register(other, echo))
	states, err := rabbitrpc.Look(t.Context(), url, "probe.v1.Probe", "nobody.v1.None", "probe.v1.Other")
	want := []rabbitrpc.ServiceState{
		{Name: "probe.v1.Probe", Replicas: 2}, {Name: "nobody.v1.None"}, {Name: "probe.v1.Other", Replicas: 1},
	}
	if err != nil || !slices.Equal(states, want) {
		t.Errorf("got %+v, %v", states, err)
	}
	ctx, stop := context.WithCancel(t.Context())
	client := newClient(t, url)
	var all pending
	all.running.Go(func() {
		for ctx.Err() == nil {
			_, _ = call(ctx, client, again, "")
		}
	})
	const period = 200 * time.Millisecond
	rates, err := rabbitrpc.Rates(t.Context(), url, rabbitrpc.DefaultExchange, period, "probe.v1.Probe",
		"probe.v1.Other")
	stop()
	all.wait()
	if err != nil || rates["probe.v1.Probe"] <= 0 || rates["probe.v1.Other"] != 0 {
		t.Errorf("got %v, %v", rates, err)
	}
}

// A call that outlives its connection keeps its slot: a replica that reconnects repeatedly does not exceed its
// prefetch.
func TestPrefetchAppliesAcrossConnections(t *testing.T) {
	t.Parallel()
	url := testenv.AMQP(t)
	proxy, proxied := testenv.ProxyURL(t, url)
	begun, proceed := make(chan string, 10), make(chan struct{})
	config := rabbitrpc.ServerConfig{URL: proxied, Prefetch: 1}
	serve(t, config, register(again, func(_ context.Context, in string) (string, error) {
		begun <- in
		<-proceed // ignores its context
		return in, nil
	}))
	ctx, cancel := context.WithCancel(t.Context())
	client := newClient(t, url)
	var first, second pending
	first.call(ctx, client, again, "first")
	receive(t, begun)
	proxy.Refuse(true)
	proxy.Cut()
	awaitReplicas(t, url, "probe.v1.Probe", 0) // the queue and the first request are gone
	proxy.Refuse(false)
	awaitReplicas(t, url, "probe.v1.Probe", 1)
	second.call(t.Context(), client, again, "second")
	testenv.Eventually(t, patience, func() error { // the server has received it
		channel := raw(t, url)
		queue, err := channel.QueueDeclarePassive("probe.v1.Probe", true, true, false, false, nil)
		if err == nil && queue.Messages != 0 {
			err = errors.New("the second request is still in the queue")
		}
		return err
	})
	select {
	case in := <-begun:
		t.Errorf("%s runs concurrently with the first", in)
	case <-time.After(50 * time.Millisecond):
	}
	close(proceed)
	if err := errors.Join(second.wait()...); err != nil {
		t.Error(err)
	}
	cancel()
	first.wait()
}

// Without interceptors, callers see no more of panics and errors than Connect shows.
func TestNothingLeaksWithoutInterceptors(t *testing.T) {
	t.Parallel()
	url := testenv.AMQP(t)
	rpc := connect.NewServer()
	register(again, func(_ context.Context, in string) (string, error) {
		switch in {
		case "panic":
			panic("secret")
		case "remote":
			return "", connect.NewError(connect.CodeNotFound, "secret").WithRemote()
		case "canceled":
			return "", fmt.Errorf("secret: %w", context.Canceled)
		}
		return "", errors.New("secret")
	})(rpc)
	start(t, rabbitrpc.ServerConfig{URL: url, Log: silent}, rpc)
	awaitReplicas(t, url, "probe.v1.Probe", 1)
	for in, want := range map[string]string{
		"panic": "internal: internal error", "remote": "internal", "canceled": "canceled", "plain": "unknown",
	} {
		if _, err := call(t.Context(), newClient(t, url), again, in); err == nil || err.Error() != want {
			t.Errorf("%s: got %v, want %s", in, err, want)
		}
	}
}
