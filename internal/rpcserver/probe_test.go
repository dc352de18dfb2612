package rpcserver_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"testing"

	"connectrpc.com/connect/v2"
	"connectrpc.com/connect/v2/connecthttp"
	"example.com/shop/internal/rpcserver"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// The probe is a service that uses only well-known types, so it does not depend on the domain.
var (
	unarySpec  = connect.Spec{Procedure: "/probe.v1.Probe/Unary", StreamType: connect.StreamTypeUnary}
	streamSpec = connect.Spec{Procedure: "/probe.v1.Probe/Stream", StreamType: connect.StreamTypeServer}
)

// unary registers a unary method that answers a string with a string.
func unary(fn func(ctx context.Context, in string) (string, error)) func(*connect.Server) {
	handle := func(ctx context.Context, _ connect.Spec, stream connect.ServerStream) error {
		var in wrapperspb.StringValue
		if err := stream.Receive(&in); err != nil {
			return err
		}
		out, err := fn(ctx, in.GetValue())
		if err != nil {
			return err
		}
		return stream.Send(wrapperspb.String(out))
	}
	return func(s *connect.Server) { s.Register(connect.Method{Spec: unarySpec, Handler: handle}) }
}

// stream registers a server-streaming method that sends strings.
func stream(fn func(ctx context.Context, in string, send func(string) error) error) func(*connect.Server) {
	handle := func(ctx context.Context, _ connect.Spec, stream connect.ServerStream) error {
		var in wrapperspb.StringValue
		if err := stream.Receive(&in); err != nil {
			return err
		}
		return fn(ctx, in.GetValue(), func(out string) error { return stream.Send(wrapperspb.String(out)) })
	}
	return func(s *connect.Server) { s.Register(connect.Method{Spec: streamSpec, Handler: handle}) }
}

func echo(_ context.Context, in string) (string, error) { return in, nil }

// running is a server that runs until stop is called or the test ends.
type running struct {
	url, addr string
	logs      *logs
	// stop begins the drain. done receives the error of Serve.
	stop context.CancelFunc
	done chan error
}

func serve(t *testing.T, config rpcserver.Config, register ...func(*connect.Server)) *running {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	r := &running{addr: listener.Addr().String(), logs: new(logs), stop: stop, done: make(chan error, 1)}
	r.url = "http://" + r.addr
	config.Log = r.logs.logger()
	server := rpcserver.New(config, register...)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		r.done <- server.Serve(ctx, listener)
	}()
	t.Cleanup(func() {
		stop()
		<-ended
	})
	return r
}

// client returns a client. Its connections are closed when the test ends, because the drain waits for them.
func (r *running) client(t *testing.T, http2 bool, options ...connecthttp.Option) *connect.Client {
	return connect.NewClient(connecthttp.NewTransport(httpClient(t, http2), r.url, options...))
}

func httpClient(t *testing.T, http2 bool) *http.Client {
	protocols := new(http.Protocols)
	protocols.SetHTTP1(!http2)
	protocols.SetUnencryptedHTTP2(http2)
	transport := &http.Transport{Protocols: protocols}
	t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport}
}

func (r *running) grpc(t *testing.T) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient(r.addr, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

func call(ctx context.Context, client *connect.Client, in string) (string, error) {
	var out wrapperspb.StringValue
	err := client.CallUnary(ctx, unarySpec, wrapperspb.String(in), &out)
	return out.GetValue(), err
}

// receiveAll opens the stream, and returns the messages and the error unless it is io.EOF.
func receiveAll(ctx context.Context, client *connect.Client, in string) (sent []string, err error) {
	stream, err := client.CallServerStream(ctx, streamSpec, wrapperspb.String(in))
	if err != nil {
		return nil, err
	}
	defer stream.Close()
	for {
		var out wrapperspb.StringValue
		switch err := stream.Receive(&out); {
		case errors.Is(err, io.EOF):
			return sent, nil
		case err != nil:
			return sent, err
		}
		sent = append(sent, out.GetValue())
	}
}

// wantError fails the test unless err has the code and the message. An empty message means any message.
func wantError(t *testing.T, err error, code connect.Code, message string) {
	t.Helper()
	var got *connect.Error
	if !errors.As(err, &got) || got.Code() != code || (message != "" && got.Message() != message) {
		t.Errorf("got error %v, want %s: %s", err, code, message)
	}
}

// logs collects the log of a server.
type logs struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (l *logs) logger() *slog.Logger {
	return slog.New(slog.NewTextHandler(l, &slog.HandlerOptions{Level: slog.LevelDebug}))
}

func (l *logs) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

func (l *logs) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}
