package rabbitrpc_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect/v2"
	"example.com/shop/internal/dev/testenv"
	"example.com/shop/internal/rabbitrpc"
	"example.com/shop/internal/rpcserver"
	amqp "github.com/rabbitmq/amqp091-go"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

const patience = 20 * time.Second

// The specs of the probe service, as generated code would have them. Requests and answers are strings.
var (
	// once is a method that must not be repeated.
	once = connect.Spec{Procedure: "/probe.v1.Probe/Once"}
	// again is a method that may be repeated.
	again  = connect.Spec{Procedure: "/probe.v1.Probe/Again", IdempotencyLevel: connect.IdempotencyIdempotent}
	other  = connect.Spec{Procedure: "/probe.v1.Other/Again", IdempotencyLevel: connect.IdempotencyNoSideEffects}
	stream = connect.Spec{Procedure: "/probe.v1.Probe/Stream", StreamType: connect.StreamTypeServer}
)

type method func(ctx context.Context, in string) (string, error)

func echo(_ context.Context, in string) (string, error) { return in, nil }

func register(spec connect.Spec, method method) func(*connect.Server) {
	return func(s *connect.Server) {
		handler := func(ctx context.Context, _ connect.Spec, stream connect.ServerStream) error {
			var in wrapperspb.StringValue
			if err := stream.Receive(&in); err != nil {
				return err
			}
			out, err := method(ctx, in.GetValue())
			if err != nil {
				return err
			}
			return stream.Send(wrapperspb.String(out))
		}
		s.Register(connect.Method{Spec: spec, Handler: handler})
	}
}

func call(ctx context.Context, client *connect.Client, spec connect.Spec, in string) (string, error) {
	var out wrapperspb.StringValue
	err := client.CallUnary(ctx, spec, wrapperspb.String(in), &out)
	return out.GetValue(), err
}

// newRPC makes a connect.Server as the processes do.
func newRPC(register ...func(*connect.Server)) *connect.Server {
	rpc := connect.NewServer(rpcserver.Interceptors(silent)...)
	for _, r := range register {
		r(rpc)
	}
	return rpc
}

var silent = slog.New(slog.NewTextHandler(io.Discard, nil))

// replica is a Server under test.
type replica struct {
	t      testing.TB
	cancel context.CancelFunc
	ended  chan struct{}
	err    error // of Run, once ended is closed
}

// serve runs a Server until the test ends or stop is called, and returns once it consumes.
func serve(t testing.TB, config rabbitrpc.ServerConfig, register ...func(*connect.Server)) *replica {
	t.Helper()
	config.Log = silent
	rpc := newRPC(register...)
	before := map[string]int{}
	for spec := range rpc.Specs() {
		before[serviceOf(spec)] = replicas(t, config.URL, serviceOf(spec))
	}
	r := start(t, config, rpc)
	for service, n := range before {
		awaitReplicas(t, config.URL, service, n+1)
	}
	return r
}

func serviceOf(spec connect.Spec) string {
	service, _, _ := strings.Cut(spec.Procedure[1:], "/")
	return service
}

func replicas(t testing.TB, url, service string) int {
	t.Helper()
	states, err := rabbitrpc.Look(t.Context(), url, service)
	if err != nil {
		t.Fatal(err)
	}
	return states[0].Replicas
}

func awaitReplicas(t testing.TB, url, service string, want int) {
	t.Helper()
	testenv.Eventually(t, patience, func() error {
		if got := replicas(t, url, service); got != want {
			return fmt.Errorf("%s has %d replicas, want %d", service, got, want)
		}
		return nil
	})
}

// start runs a Server in the background, and does not wait until it consumes.
func start(t testing.TB, config rabbitrpc.ServerConfig, rpc *connect.Server) *replica {
	ctx, cancel := context.WithCancel(context.Background())
	r := &replica{t: t, cancel: cancel, ended: make(chan struct{})}
	go func() {
		defer close(r.ended)
		r.err = rabbitrpc.NewServer(config, rpc).Run(ctx)
	}()
	t.Cleanup(func() {
		cancel()
		<-r.ended
	})
	return r
}

func (r *replica) stop() error {
	r.t.Helper()
	r.cancel()
	select {
	case <-r.ended:
	case <-time.After(patience):
		r.t.Fatalf("Run did not return within %s", patience)
	}
	return r.err
}

func newTransport(t testing.TB, config rabbitrpc.TransportConfig) *rabbitrpc.Transport {
	transport := rabbitrpc.NewTransport(config)
	t.Cleanup(func() { _ = transport.Close() })
	return transport
}

func newClient(t testing.TB, url string) *connect.Client {
	return connect.NewClient(newTransport(t, rabbitrpc.TransportConfig{URL: url, Timeout: 2 * time.Minute}))
}

// wantError fails the test unless err has the code and exactly the message. "" matches any message.
func wantError(t *testing.T, err error, code connect.Code, message string) {
	t.Helper()
	var got *connect.Error
	if !errors.As(err, &got) || got.Code() != code || (message != "" && got.Message() != message) {
		t.Errorf("got error %v, want %s: %s", err, code, message)
	}
}

// raw opens a channel without the code under test.
func raw(t *testing.T, url string) *amqp.Channel {
	t.Helper()
	conn, err := amqp.Dial(url)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	channel, err := conn.Channel()
	if err != nil {
		t.Fatal(err)
	}
	return channel
}

// receive waits for a value and fails the test if none arrives.
func receive[T any](t *testing.T, from <-chan T) T {
	t.Helper()
	select {
	case value := <-from:
		return value
	case <-time.After(patience):
		t.Fatalf("nothing received within %s", patience)
		panic("unreachable")
	}
}

// pending are calls that run concurrently with the test.
type pending struct {
	running sync.WaitGroup
	mu      sync.Mutex
	errs    []error
}

func (p *pending) call(ctx context.Context, client *connect.Client, spec connect.Spec, in string) {
	p.running.Go(func() {
		out, err := call(ctx, client, spec, in)
		if err == nil && out != in {
			err = errors.New("another call's answer")
		}
		p.mu.Lock()
		defer p.mu.Unlock()
		p.errs = append(p.errs, err)
	})
}

// wait waits for all calls and returns their errors.
func (p *pending) wait() []error {
	p.running.Wait()
	return p.errs
}

func encode(t *testing.T, message proto.Message) []byte {
	body, err := proto.Marshal(message)
	if err != nil {
		t.Error(err)
	}
	return body
}
