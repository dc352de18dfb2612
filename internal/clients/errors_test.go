package clients_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"testing"

	"connectrpc.com/connect/v2"
	"connectrpc.com/connect/v2/connecthttp"
	"example.com/shop/internal/clients"
	"example.com/shop/internal/dev/probe"
	"example.com/shop/internal/rpcserver"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// follow serves probe.Follow: it sends two messages, and fails if the request says so.
func follow(server *connect.Server) {
	server.Register(connect.Method{
		Spec: probe.Follow,
		Handler: func(_ context.Context, _ connect.Spec, stream connect.ServerStream) error {
			var request wrapperspb.StringValue
			err := stream.Receive(&request)
			for range 2 {
				err = errors.Join(err, stream.Send(&request))
			}
			if request.GetValue() == "fail" {
				err = errors.Join(err, connect.NewError(connect.CodeNotFound, "secret"))
			}
			return err
		},
	})
}

// receive returns how many messages a stream sends, and its error unless that is io.EOF.
func receive(ctx context.Context, client *connect.Client, text string) (n int, err error) {
	stream, err := client.CallServerStream(ctx, probe.Follow, wrapperspb.String(text))
	if err != nil {
		return 0, err
	}
	for {
		var response wrapperspb.StringValue
		switch err := stream.Receive(&response); {
		case errors.Is(err, io.EOF):
			return n, stream.Close()
		case err != nil:
			return n, errors.Join(err, stream.Close())
		}
		n++
	}
}

// Every error of a stream is remote, and the end of a stream is no error.
func TestErrorsOfStreamsAreRemote(t *testing.T) {
	t.Parallel()
	silent := slog.New(slog.DiscardHandler)
	server := httptest.NewServer(rpcserver.New(rpcserver.Config{Log: silent}, follow))
	defer server.Close()
	for _, options := range [][]connecthttp.Option{nil, {connecthttp.WithGRPCWeb()}} {
		at := func(url string) *connect.Client {
			return clients.New(connecthttp.NewTransport(server.Client(), url, options...), clients.Config{Attempts: 1})
		}
		if n, err := receive(t.Context(), at(server.URL), "hello"); n != 2 || err != nil {
			t.Errorf("received %d messages, %v", n, err)
		}
		n, err := receive(t.Context(), at(server.URL), "fail")
		wantRemote(t, err, connect.CodeNotFound)
		if n != 2 {
			t.Errorf("received %d messages before the error", n)
		}
		_, err = receive(t.Context(), at("http://127.0.0.1:1"), "away")
		wantRemote(t, err, connect.CodeUnavailable)
	}
	broken := httptest.NewServer(http.NotFoundHandler())
	defer broken.Close()
	client := clients.New(connecthttp.NewTransport(broken.Client(), broken.URL), clients.Config{Attempts: 1})
	_, err := receive(t.Context(), client, "no service")
	wantRemote(t, err, connect.CodeUnimplemented)
}

func wantRemote(t *testing.T, err error, code connect.Code) {
	t.Helper()
	var got *connect.Error
	if !errors.As(err, &got) || got.Code() != code || !got.IsRemote() {
		t.Errorf("got %v, want a remote error with code %s", err, code)
	}
}

func TestPass(t *testing.T) {
	t.Parallel()
	remote := fmt.Errorf("get customer: %w", connect.NewError(connect.CodeNotFound, "secret").WithRemote())
	passed := clients.Pass(remote, connect.CodeAborted, connect.CodeNotFound)
	var own *connect.Error
	if !errors.As(passed, &own) || own.IsRemote() || !errors.Is(passed, remote) ||
		own.Error() != "not_found: a service that this one calls answered not_found" {
		t.Errorf("got %v", passed)
	}
	other := errors.New("other")
	for _, err := range []error{nil, other, remote} {
		if got := clients.Pass(err, connect.CodeAborted); !errors.Is(got, err) || got != err {
			t.Errorf("got %v, want %v", got, err)
		}
	}
	if got := clients.Pass(other, connect.CodeUnknown); got != other {
		t.Errorf("an error without a code is passed as %v", got)
	}
}
