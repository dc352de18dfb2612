package rabbitrpc_test

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect/v2"
	"connectrpc.com/connect/v2/connectproto"
	"example.com/shop/internal/clients"
	"example.com/shop/internal/rabbitrpc"
	"google.golang.org/protobuf/types/known/durationpb"
)

const (
	secret = "secret: host db-1"
	// unavailable is what the caller gets if the service that its own one calls does not work now.
	unavailable = "unavailable: a service that this one calls is unavailable, try again with the same ID"
	internal    = "internal: internal error"
)

// seenByCaller are the errors that a caller gets for each code that the other service returns.
var seenByCaller = map[connect.Code]string{
	connect.CodeCanceled: unavailable, connect.CodeUnknown: internal, connect.CodeInvalidArgument: internal,
	connect.CodeDeadlineExceeded: unavailable, connect.CodeNotFound: internal, connect.CodeAlreadyExists: internal,
	connect.CodePermissionDenied: internal, connect.CodeResourceExhausted: unavailable,
	connect.CodeFailedPrecondition: internal, connect.CodeAborted: unavailable, connect.CodeOutOfRange: internal,
	connect.CodeUnimplemented: internal, connect.CodeInternal: internal, connect.CodeUnavailable: unavailable,
	connect.CodeDataLoss: internal, connect.CodeUnauthenticated: internal,
}

// chain is a service that calls another one. The caller calls the outer service with the name of what the inner one
// does.
type chain struct {
	inner, outer *testbed
	begun        chan struct{} // receives when the inner service has begun to hang
}

func newChain(t *testing.T, inner, outer *testbed) *chain {
	inner.t, outer.t = t, t
	c := &chain{inner: inner, outer: outer, begun: make(chan struct{}, 1)}
	inner.serve(register(again, c.answer))
	single := clients.Config{Attempts: 1}
	client := clients.New(inner.transport(), single)
	broken := map[string]*connect.Client{
		"away": clients.New((&testbed{t: t, name: "HTTP"}).transport(), single),
		// This client does not mark its errors.
		"away, other client": (&testbed{t: t, name: "HTTP"}).client(),
		"broker away": clients.New(newTransport(t, rabbitrpc.TransportConfig{
			URL: "amqp://guest:guest@127.0.0.1:1/",
		}), single),
	}
	outer.serve(register(once, func(ctx context.Context, in string) (string, error) {
		if client := broken[in]; client != nil {
			return call(ctx, client, again, in)
		}
		if in == "slow" {
			limited, cancel := context.WithTimeout(ctx, 200*time.Millisecond)
			defer cancel()
			return call(limited, client, again, "hang")
		}
		code, passed := strings.CutPrefix(in, "pass ")
		out, err := call(ctx, client, again, code)
		if passed {
			err = clients.Pass(err, connect.CodeNotFound, connect.CodeFailedPrecondition)
		}
		return out, err
	}))
	return c
}

// answer is the method of the inner service.
func (c *chain) answer(ctx context.Context, in string) (string, error) {
	for code := range seenByCaller {
		if code.String() == in {
			detail, err := connectproto.NewErrorDetail(durationpb.New(time.Second))
			if err != nil {
				return "", err
			}
			return "", connect.NewError(code, secret).WithDetail(detail)
		}
	}
	if in == "hang" {
		c.begun <- struct{}{}
		<-ctx.Done()
		return "", ctx.Err()
	}
	return in, nil
}

// A caller gets at most the code of an error of another service, and nothing of its text, over every pair of transports
// and whichever transport made the error.
func TestErrorsOfOtherServices(t *testing.T) {
	t.Parallel()
	for i := range 2 {
		for j := range 2 {
			inner, outer := testbeds(t)[i], testbeds(t)[j]
			t.Run(inner.name+"Behind"+outer.name, func(t *testing.T) {
				t.Parallel()
				c := newChain(t, inner, outer)
				client := outer.client()
				outer.wantEcho(t, client, "hello")
				want := map[string]string{
					"away": unavailable, "away, other client": unavailable, "broker away": unavailable, "slow": unavailable,
					"pass not_found":           "not_found: a service that this one calls answered not_found",
					"pass failed_precondition": "failed_precondition: a service that this one calls answered failed_precondition",
					"pass internal":            internal, "pass unavailable": unavailable,
				}
				for code, seen := range seenByCaller {
					want[code.String()] = seen
				}
				for in, seen := range want {
					wantSeen(t, client, in, seen)
				}
				<-c.begun // by slow
				go func() {
					<-c.begun
					inner.proxy.Cut()
				}()
				wantSeen(t, client, "hang", unavailable)
			})
		}
	}
}

// wantSeen checks the error of a call, and that it has no details.
func wantSeen(t *testing.T, client *connect.Client, in, want string) {
	t.Helper()
	_, err := call(t.Context(), client, once, in)
	var got *connect.Error
	if !errors.As(err, &got) || got.Error() != want || len(got.Details()) != 0 {
		t.Errorf("%s: got %v with details %v, want %s", in, err, got.Details(), want)
	}
}

// The caller's own deadline stays deadline_exceeded, however the other service reports it.
func TestTheCallersDeadlineIsItsOwn(t *testing.T) {
	t.Parallel()
	for i := range 2 {
		inner, outer := testbeds(t)[i], testbeds(t)[1]
		t.Run(inner.name, func(t *testing.T) {
			t.Parallel()
			newChain(t, inner, outer)
			client := outer.client()
			outer.wantEcho(t, client, "connected")
			ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
			defer cancel()
			_, err := call(ctx, client, once, "hang")
			wantError(t, err, connect.CodeDeadlineExceeded, "")
		})
	}
}
