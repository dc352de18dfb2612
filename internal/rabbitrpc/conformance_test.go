package rabbitrpc_test

import (
	"context"
	"errors"
	"net"
	"net/http"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"connectrpc.com/connect/v2"
	"connectrpc.com/connect/v2/connecthttp"
	"connectrpc.com/connect/v2/connectproto"
	"example.com/shop/internal/dev/testenv"
	"example.com/shop/internal/rabbitrpc"
	"example.com/shop/internal/rpcserver"
	amqp "github.com/rabbitmq/amqp091-go"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// testbed is a transport with the means to serve, to call, and to inject faults. Each test case must pass on all
// testbeds.
type testbed struct {
	t     testing.TB
	name  string
	proxy *testenv.TCPProxy // between the client and the server or broker
	// url is what the client calls. It leads through the proxy.
	url string
	// direct is the same without the proxy.
	direct string
}

// readLimit is below the largest message that the test broker accepts.
const readLimit = 400 << 10

func testbeds(t *testing.T) []*testbed {
	amqpURL := testenv.AMQP(t)
	proxy, url := testenv.ProxyURL(t, amqpURL)
	return []*testbed{{name: "RabbitMQ", proxy: proxy, url: url, direct: amqpURL}, {name: "HTTP"}}
}

// serve serves methods until the test ends.
func (b *testbed) serve(methods ...func(*connect.Server)) {
	b.t.Helper()
	if b.name == "RabbitMQ" {
		serve(b.t, rabbitrpc.ServerConfig{URL: b.direct, RequestMaxBytes: readLimit, ReplyMaxBytes: readLimit},
			methods...)
		return
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	server := rpcserver.New(rpcserver.Config{Log: silent, ReadMaxBytes: readLimit, DrainTimeout: time.Second},
		methods...)
	go func() {
		defer close(ended)
		_ = server.Serve(ctx, listener)
	}()
	b.t.Cleanup(func() {
		cancel()
		<-ended
	})
	b.reach(listener.Addr().String())
}

// reach makes HTTP clients call this address.
func (b *testbed) reach(address string) {
	b.direct = "http://" + address
	b.proxy, b.url = testenv.ProxyURL(b.t, b.direct)
}

// client returns a client for what serve serves.
func (b *testbed) client() *connect.Client { return connect.NewClient(b.transport()) }

func (b *testbed) transport() connect.Transport {
	if b.name == "RabbitMQ" {
		config := rabbitrpc.TransportConfig{URL: b.url, RequestMaxBytes: readLimit, ReplyMaxBytes: readLimit}
		return newTransport(b.t, config)
	}
	protocols := new(http.Protocols)
	protocols.SetUnencryptedHTTP2(true)
	transport := &http.Transport{Protocols: protocols}
	b.t.Cleanup(transport.CloseIdleConnections)
	if b.url == "" {
		b.url = "http://127.0.0.1:1" // nothing listens there
	}
	client := &http.Client{Transport: transport}
	return connecthttp.NewTransport(client, b.url, connecthttp.WithReadMaxBytes(readLimit))
}

// TestConformance checks that callers see the same over both transports. docs/rpc-over-rabbitmq.md lists the
// differences.
func TestConformance(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]func(t *testing.T, b *testbed){
		"Answer":               conformAnswer,
		"EmptyMessages":        conformEmpty,
		"ErrorWithDetails":     conformError,
		"OtherErrorsAreHidden": conformHidden,
		"UnknownMethod":        conformUnknown,
		"Deadline":             conformDeadline,
		"Cancel":               conformCancel,
		"Metadata":             conformMetadata,
		"MetadataOfErrors":     conformMetadataOfErrors,
		"Big":                  conformBig,
		"Oversize":             conformOversize,
		"Panic":                conformPanic,
		"NoServer":             conformNoServer,
		"ServerDies":           conformServerDies,
		"ReplyLost":            conformReplyLost,
		"ConnectionLost":       conformConnectionLost,
		"DuplicateReply":       conformDuplicateReply,
		"ForeignReplyTo":       conformForeignReplyTo,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			for _, b := range testbeds(t) {
				t.Run(b.name, func(t *testing.T) {
					b.t = t
					test(t, b)
				})
			}
		})
	}
}

func (b *testbed) wantEcho(t *testing.T, client *connect.Client, in string) {
	t.Helper()
	if out, err := call(t.Context(), client, once, in); err != nil || out != in {
		t.Errorf("sent %d bytes, got %d bytes back, error %v", len(in), len(out), err)
	}
}

func conformAnswer(t *testing.T, b *testbed) {
	b.serve(register(once, echo))
	b.wantEcho(t, b.client(), "hello")
}

func conformEmpty(t *testing.T, b *testbed) {
	b.serve(register(once, echo))
	b.wantEcho(t, b.client(), "")
}

func conformError(t *testing.T, b *testbed) {
	detail, err := connectproto.NewErrorDetail(durationpb.New(42 * time.Second))
	if err != nil {
		t.Fatal(err)
	}
	b.serve(register(once, func(context.Context, string) (string, error) {
		return "", connect.NewError(connect.CodeFailedPrecondition, "not now — später").WithDetail(detail)
	}))
	_, err = call(t.Context(), b.client(), once, "")
	wantError(t, err, connect.CodeFailedPrecondition, "not now — später")
	var got *connect.Error
	if !errors.As(err, &got) || !got.IsRemote() || len(got.Details()) != 1 {
		t.Fatalf("got %#v, want a remote error with one detail", got)
	}
	decoded, err := connectproto.UnmarshalErrorDetail(got.Details()[0])
	if d, ok := decoded.(*durationpb.Duration); !ok || d.GetSeconds() != 42 {
		t.Errorf("detail is %v, %v", decoded, err)
	}
}

func conformHidden(t *testing.T, b *testbed) {
	b.serve(register(once, func(_ context.Context, in string) (string, error) {
		if in == "remote" {
			return "", connect.NewError(connect.CodeNotFound, "secret").WithRemote()
		}
		return "", errors.New("secret")
	}))
	for _, in := range []string{"remote", "plain"} {
		_, err := call(t.Context(), b.client(), once, in)
		wantError(t, err, connect.CodeInternal, "internal error")
	}
}

func conformUnknown(t *testing.T, b *testbed) {
	b.serve(register(once, echo))
	_, err := call(t.Context(), b.client(), connect.Spec{Procedure: "/probe.v1.Probe/None"}, "")
	wantError(t, err, connect.CodeUnimplemented, "")
}

// The handler's context ends when the caller's does, and the caller does not wait for the handler.
func conformDeadline(t *testing.T, b *testbed) {
	ended := make(chan error, 1)
	b.serve(register(once, func(ctx context.Context, in string) (string, error) {
		if in == "connected" {
			return in, nil
		}
		<-ctx.Done()
		ended <- ctx.Err()
		return "", ctx.Err()
	}))
	client := b.client()
	b.wantEcho(t, client, "connected")
	ctx, cancel := context.WithTimeout(t.Context(), time.Second) // enough to reach the server on a busy machine
	defer cancel()
	_, err := call(ctx, client, once, "")
	wantError(t, err, connect.CodeDeadlineExceeded, "") // the caller's own or the server's, whichever comes first
	receive(t, ended)
}

func conformCancel(t *testing.T, b *testbed) {
	begun, proceed := make(chan struct{}), make(chan struct{})
	b.serve(register(once, func(context.Context, string) (string, error) {
		close(begun)
		<-proceed
		return "", nil
	}))
	defer close(proceed)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	client := b.client()
	go func() {
		_, err := call(ctx, client, once, "")
		done <- err
	}()
	receive(t, begun)
	cancel()
	err := receive(t, done)
	wantError(t, err, connect.CodeCanceled, "")
	if !errors.Is(err, context.Canceled) {
		t.Errorf("the cause is lost: %v", err)
	}
}

func conformMetadata(t *testing.T, b *testbed) {
	b.serve(register(once, func(ctx context.Context, _ string) (string, error) {
		info, _ := connect.CallInfoForServerContext(ctx)
		request, response := info.RequestHeader(), info.ResponseHeader()
		response.SetValues("Answer", slices.Concat(request.Values("List"), request.Values("Cc")))
		response.Set("Bytes-Bin", request.Get("Bytes-Bin"))
		info.ResponseTrailer().Set("Late", "trailer")
		return request.Get("authorization"), nil
	}))
	ctx, info := connect.NewClientContext(t.Context())
	info.RequestHeader().Set("Authorization", "Bearer token")
	info.RequestHeader().SetValues("List", []string{"one", "two"})
	info.RequestHeader().Set("CC", "elsewhere") // as a top-level header, it would be a second routing key
	info.RequestHeader().Set("Bytes-Bin", connect.EncodeBinaryHeader([]byte{0, 255}))
	info.RequestHeader().Set("Content-Type", "forged") // belongs to the transport
	out, err := call(ctx, b.client(), once, "")
	if err != nil || out != "Bearer token" {
		t.Fatalf("got %q, %v", out, err)
	}
	if got := info.ResponseHeader().Values("Answer"); !slices.Equal(got, []string{"one", "two", "elsewhere"}) {
		t.Errorf("response header %q", got)
	}
	got, err := connect.DecodeBinaryHeader(info.ResponseHeader().Get("Bytes-Bin"))
	if err != nil || string(got) != "\x00\xff" {
		t.Errorf("binary header %q, %v", got, err)
	}
	if got := info.ResponseTrailer().Get("Late"); got != "trailer" {
		t.Errorf("trailer %q", got)
	}
}

func conformMetadataOfErrors(t *testing.T, b *testbed) {
	b.serve(register(once, func(ctx context.Context, _ string) (string, error) {
		info, _ := connect.CallInfoForServerContext(ctx)
		info.ResponseHeader().Set("Retry-After", "7")
		return "", connect.NewError(connect.CodeUnavailable, "later")
	}))
	ctx, info := connect.NewClientContext(t.Context())
	_, err := call(ctx, b.client(), once, "")
	wantError(t, err, connect.CodeUnavailable, "later")
	if got := info.ResponseHeader().Get("Retry-After"); got != "7" {
		t.Errorf("header of an error: %q", got)
	}
}

func conformBig(t *testing.T, b *testbed) {
	b.serve(register(once, echo))
	b.wantEcho(t, b.client(), strings.Repeat("x", 300<<10))
}

func conformOversize(t *testing.T, b *testbed) {
	b.serve(register(once, func(_ context.Context, in string) (string, error) {
		if in == "big answer" {
			return strings.Repeat("x", readLimit+1), nil
		}
		return in, nil
	}))
	client := b.client()
	for _, in := range []string{"big answer", strings.Repeat("x", readLimit+1)} {
		_, err := call(t.Context(), client, once, in)
		wantError(t, err, connect.CodeResourceExhausted, "")
	}
	b.wantEcho(t, client, "still there")
}

func conformPanic(t *testing.T, b *testbed) {
	b.serve(register(once, func(_ context.Context, in string) (string, error) {
		if in == "panic" {
			panic("secret")
		}
		return in, nil
	}))
	client := b.client()
	_, err := call(t.Context(), client, once, "panic")
	wantError(t, err, connect.CodeInternal, "internal error")
	b.wantEcho(t, client, "still there")
}

// If no server runs, callers learn that at once and not at the deadline.
func conformNoServer(t *testing.T, b *testbed) {
	client := b.client()
	_, err := call(t.Context(), client, once, "") // connects if necessary
	wantError(t, err, connect.CodeUnavailable, "")
	began := time.Now()
	_, err = call(t.Context(), client, once, "")
	wantError(t, err, connect.CodeUnavailable, "")
	if took := time.Since(began); took > time.Second { // usually 1 to 3 ms; the machine may be busy
		t.Errorf("took %s", took)
	}
}

// A server dies during a call that must not be repeated. Over RabbitMQ the next replica refuses to execute it.
func conformServerDies(t *testing.T, b *testbed) {
	role := "http"
	if b.name == "RabbitMQ" {
		role = "amqp"
	}
	server := spawn(t, role, "AMQP_URL="+b.direct, effectsVariable+"="+t.TempDir())
	if role == "http" {
		b.reach(receive(t, server.lines))
	} else {
		awaitReplicas(t, b.direct, "probe.v1.Probe", 1)
	}
	done := make(chan error, 1)
	client := b.client()
	go func() {
		_, err := call(t.Context(), client, once, "hang")
		done <- err
	}()
	receive(t, server.lines)
	if role == "amqp" {
		serve(t, rabbitrpc.ServerConfig{URL: b.direct}, register(once, func(context.Context, string) (string, error) {
			t.Error("a call that must not be repeated was repeated")
			return "", nil
		}))
	}
	server.kill()
	b.wantLost(t, receive(t, done))
}

// expiring is a context whose deadline passes when the test closes done. So it cannot expire before the tested step.
type expiring struct {
	context.Context
	done chan struct{}
}

func (e *expiring) Done() <-chan struct{} { return e.done }

func (e *expiring) Err() error {
	select {
	case <-e.done:
		return context.DeadlineExceeded
	default:
		return nil
	}
}

// The network silently loses the answer.
func conformReplyLost(t *testing.T, b *testbed) {
	ctx := &expiring{Context: t.Context(), done: make(chan struct{})}
	b.serve(register(once, func(_ context.Context, in string) (string, error) {
		if in == "lost" {
			b.proxy.Freeze(true)
			close(ctx.done)
		}
		return in, nil
	}))
	client := b.client()
	b.wantEcho(t, client, "connected")
	_, err := call(ctx, client, once, "lost")
	wantError(t, err, connect.CodeDeadlineExceeded, "")
	b.proxy.Freeze(false)
	b.wantEcho(t, client, "back") // and not "lost"
}

func conformConnectionLost(t *testing.T, b *testbed) {
	begun, proceed := make(chan struct{}), make(chan struct{})
	b.serve(register(once, func(_ context.Context, in string) (string, error) {
		if in == "lost" {
			close(begun)
			<-proceed
		}
		return in, nil
	}))
	defer close(proceed)
	client := b.client()
	done := make(chan error, 1)
	go func() {
		_, err := call(t.Context(), client, once, "lost")
		done <- err
	}()
	receive(t, begun)
	b.proxy.Cut()
	b.wantLost(t, receive(t, done))
	testenv.Eventually(t, patience, func() error { // the client reconnects automatically
		_, err := call(t.Context(), client, once, "back")
		return err
	})
}

// A server answers twice: the first answer counts, and the second is dropped. This cannot happen over HTTP.
func conformDuplicateReply(t *testing.T, b *testbed) {
	if b.name != "RabbitMQ" {
		conformAnswer(t, b)
		return
	}
	b.answerWith(t, func(channel *amqp.Channel, request *amqp.Delivery) {
		for _, text := range []string{"first", "second"} {
			answer(t, channel, request, text)
		}
	})
	client := b.client()
	for range 10 {
		if out, err := call(t.Context(), client, once, ""); err != nil || out != "first" {
			t.Fatalf("got %q, %v", out, err)
		}
	}
}

// An answer with another call's ID, or without an ID, is dropped. The caller still gets its own answer.
func conformForeignReplyTo(t *testing.T, b *testbed) {
	if b.name != "RabbitMQ" {
		conformAnswer(t, b)
		return
	}
	b.answerWith(t, func(channel *amqp.Channel, request *amqp.Delivery) {
		for _, id := range []string{"", "0123456789abcdef0123456789abcdef", request.CorrelationId[:31]} {
			forged := *request
			forged.CorrelationId = id
			answer(t, channel, &forged, "forged")
		}
		answer(t, channel, request, "own")
	})
	if out, err := call(t.Context(), b.client(), once, ""); err != nil || out != "own" {
		t.Fatalf("got %q, %v", out, err)
	}
}

// wantLost fails the test unless err is what callers get when their connection or their server is lost. Connect's HTTP
// client reports a reset connection as canceled.
func (b *testbed) wantLost(t *testing.T, err error) {
	t.Helper()
	if b.name == "HTTP" && errors.Is(err, syscall.ECONNRESET) {
		return
	}
	wantError(t, err, connect.CodeUnavailable, "")
}

// answerWith serves the probe without the code under test.
func (b *testbed) answerWith(t *testing.T, reply func(*amqp.Channel, *amqp.Delivery)) {
	t.Helper()
	channel := raw(t, b.direct)
	err := channel.ExchangeDeclare(rabbitrpc.DefaultExchange, "direct", true, false, false, false, nil)
	if err == nil {
		_, err = channel.QueueDeclare("raw", false, true, true, false, nil)
	}
	if err == nil {
		err = channel.QueueBind("raw", "probe.v1.Probe", rabbitrpc.DefaultExchange, false, nil)
	}
	if err != nil {
		t.Fatal(err)
	}
	requests, err := channel.Consume("raw", "", true, false, false, false, nil)
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		for request := range requests {
			reply(channel, &request)
		}
	}()
}

func answer(t *testing.T, channel *amqp.Channel, request *amqp.Delivery, text string) {
	err := channel.Publish("", request.ReplyTo, false, false, amqp.Publishing{
		CorrelationId: request.CorrelationId, Type: "answer", Body: encode(t, wrapperspb.String(text)),
	})
	if err != nil {
		t.Error(err)
	}
}
