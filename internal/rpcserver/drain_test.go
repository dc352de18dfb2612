package rpcserver_test

import (
	"context"
	"errors"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect/v2"
	"example.com/shop/internal/rpcserver"
	"google.golang.org/grpc/codes"
	reflectionv1 "google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

func TestDrainFinishesUnaryCallsAndEndsStreams(t *testing.T) {
	t.Parallel()
	for _, transport := range transports {
		t.Run(transport.name, func(t *testing.T) {
			t.Parallel()
			arrived, proceed := make(chan struct{}), make(chan struct{})
			server := serve(t, rpcserver.Config{},
				unary(func(ctx context.Context, in string) (string, error) {
					close(arrived)
					<-proceed
					return in, ctx.Err()
				}),
				stream(func(ctx context.Context, _ string, send func(string) error) error {
					if err := send("first"); err != nil {
						return err
					}
					<-ctx.Done()
					return ctx.Err()
				}))
			client := server.client(t, transport.http2, transport.options...)
			unaryEnded := make(chan error, 1)
			go func() {
				_, err := call(t.Context(), client, "hello")
				unaryEnded <- err
			}()
			<-arrived
			watch, err := client.CallServerStream(t.Context(), streamSpec, wrapperspb.String(""))
			if err != nil {
				t.Fatal(err)
			}
			defer watch.Close()
			if err := watch.Receive(new(wrapperspb.StringValue)); err != nil {
				t.Fatal(err)
			}

			server.stop()
			err = watch.Receive(new(wrapperspb.StringValue))
			wantError(t, err, connect.CodeUnavailable, "server is shutting down, try again")
			select {
			case err := <-server.done:
				t.Fatalf("drained before the unary call was answered: %v", err)
			default:
			}
			close(proceed)
			if err := <-unaryEnded; err != nil {
				t.Errorf("running unary call: %v", err)
			}
			if err := <-server.done; err != nil {
				t.Errorf("Serve: %v", err)
			}
		})
	}
}

// The handler blocks in Receive, which ignores the context.
func TestDrainEndsStreamsThatWaitForTheCaller(t *testing.T) {
	t.Parallel()
	server := serve(t, rpcserver.Config{DrainTimeout: time.Minute})
	reflection, err := reflectionv1.NewServerReflectionClient(server.grpc(t)).ServerReflectionInfo(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	list := &reflectionv1.ServerReflectionRequest{MessageRequest: &reflectionv1.ServerReflectionRequest_ListServices{}}
	if err := reflection.Send(list); err != nil {
		t.Fatal(err)
	}
	if _, err := reflection.Recv(); err != nil {
		t.Fatal(err)
	}
	server.stop()
	if _, err := reflection.Recv(); status.Code(err) != codes.Unavailable {
		t.Errorf("stream ended with %v", err)
	}
	if err := <-server.done; err != nil {
		t.Errorf("Serve: %v", err)
	}
}

func TestDrainTimeoutCutsOffStuckCalls(t *testing.T) {
	t.Parallel()
	arrived, ended := make(chan struct{}), make(chan struct{})
	stuck := unary(func(ctx context.Context, _ string) (string, error) {
		close(arrived)
		<-ctx.Done()
		close(ended)
		return "", ctx.Err()
	})
	server := serve(t, rpcserver.Config{DrainTimeout: 50 * time.Millisecond}, stuck)
	answered := make(chan error, 1)
	client := server.client(t, false)
	go func() {
		_, err := call(t.Context(), client, "")
		answered <- err
	}()
	<-arrived
	server.stop()
	if err := <-server.done; !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Serve: %v", err)
	}
	<-ended
	if err := <-answered; err == nil {
		t.Error("the call succeeded")
	}
}

// The drain ends a request whose body has not fully arrived. The request would delay the shutdown, and nothing was
// done.
func TestDrainEndsRequestsThatHaveNotArrived(t *testing.T) {
	t.Parallel()
	for name, http2 := range map[string]bool{"HTTP/1.1": false, "HTTP/2": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			begun := make(chan struct{})
			announce := func(next connect.ServerFunc) connect.ServerFunc {
				return func(ctx context.Context, spec connect.Spec, stream connect.ServerStream) error {
					close(begun)
					return next(ctx, spec, stream)
				}
			}
			server := serve(t, rpcserver.Config{
				DrainTimeout: time.Minute, BodyTimeout: time.Minute,
				Interceptors: []connect.ServerInterceptor{announce},
			}, unary(echo))
			held, body := io.Pipe()
			defer body.Close()
			request, err := http.NewRequestWithContext(t.Context(), http.MethodPost, server.url+unarySpec.Procedure,
				held)
			if err != nil {
				t.Fatal(err)
			}
			request.Header.Set("Content-Type", "application/json")
			client := httpClient(t, http2)
			answered := make(chan string, 1)
			go func() {
				response, err := client.Do(request)
				if err != nil {
					answered <- err.Error()
					return
				}
				defer response.Body.Close()
				text, _ := io.ReadAll(response.Body)
				answered <- string(text)
			}()
			if _, err := io.WriteString(body, `"hel`); err != nil { // returns when the client has read it
				t.Fatal(err)
			}
			<-begun
			began := time.Now()
			server.stop()
			if err := <-server.done; err != nil {
				t.Errorf("Serve: %v", err)
			}
			if took := time.Since(began); took > 10*time.Second {
				t.Errorf("the drain took %s", took)
			}
			if text := <-answered; !strings.Contains(text, "server is shutting down") {
				t.Errorf("the caller got %s", text)
			}
		})
	}
}
