package rpcserver_test

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"buf.build/gen/go/bufbuild/protovalidate/protocolbuffers/go/buf/validate"
	"connectrpc.com/connect/v2"
	"connectrpc.com/connect/v2/connecthttp"
	"connectrpc.com/connect/v2/connectproto"
	"example.com/shop/internal/outbox"
	"example.com/shop/internal/postgres"
	"example.com/shop/internal/rpcserver"
	"google.golang.org/grpc/codes"
	reflectionv1 "google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/descriptorpb"
	"google.golang.org/protobuf/types/dynamicpb"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// transports are all protocols that clients can use.
var transports = []struct {
	name    string
	http2   bool
	options []connecthttp.Option
}{
	{"connect over HTTP/1", false, nil},
	{"connect over HTTP/2", true, nil},
	{"connect with JSON", false, []connecthttp.Option{connecthttp.WithProtoJSON()}},
	{"connect with gzip", false, []connecthttp.Option{connecthttp.WithSendGzip()}},
	{"grpc", true, []connecthttp.Option{connecthttp.WithGRPC()}},
	{"grpc with gzip", true, []connecthttp.Option{connecthttp.WithGRPC(), connecthttp.WithSendGzip()}},
	{"grpc-web over HTTP/1", false, []connecthttp.Option{connecthttp.WithGRPCWeb()}},
	{"grpc-web over HTTP/2", true, []connecthttp.Option{connecthttp.WithGRPCWeb()}},
}

func TestOnePortServesEveryProtocol(t *testing.T) {
	t.Parallel()
	twice := func(_ context.Context, in string, send func(string) error) error {
		return errors.Join(send(in), send(in))
	}
	server := serve(t, rpcserver.Config{}, unary(echo), stream(twice))
	for _, transport := range transports {
		t.Run(transport.name, func(t *testing.T) {
			t.Parallel()
			client := server.client(t, transport.http2, transport.options...)
			if out, err := call(t.Context(), client, "hello"); err != nil || out != "hello" {
				t.Errorf("unary: got %q, %v", out, err)
			}
			sent, err := receiveAll(t.Context(), client, "hello")
			if err != nil || !slices.Equal(sent, []string{"hello", "hello"}) {
				t.Errorf("stream: got %q, %v", sent, err)
			}
		})
	}
	t.Run("grpc-go", func(t *testing.T) {
		t.Parallel()
		var out wrapperspb.StringValue
		err := server.grpc(t).Invoke(t.Context(), unarySpec.Procedure, wrapperspb.String("hello"), &out)
		if err != nil || out.GetValue() != "hello" {
			t.Errorf("got %q, %v", out.GetValue(), err)
		}
	})
	t.Run("curl", func(t *testing.T) {
		t.Parallel()
		body := strings.NewReader(`"hello"`)
		res, err := httpClient(t, false).Post(server.url+unarySpec.Procedure, "application/json", body)
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		if body, _ := io.ReadAll(res.Body); res.StatusCode != 200 || string(body) != `"hello"` {
			t.Errorf("got %s %s", res.Status, body)
		}
	})
}

func TestOnlyLongResponsesAreCompressed(t *testing.T) {
	t.Parallel()
	server := serve(t, rpcserver.Config{}, unary(echo))
	for length, want := range map[int]string{100: "", 2000: "gzip"} {
		body := strings.NewReader(`"` + strings.Repeat("x", length) + `"`)
		req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, server.url+unarySpec.Procedure, body)
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Content-Type", "application/json")
		req.Header.Set("Accept-Encoding", "gzip") // set explicitly, so that the client does not decompress the response
		res, err := httpClient(t, false).Do(req)
		if err != nil {
			t.Fatal(err)
		}
		_ = res.Body.Close()
		if got := res.Header.Get("Content-Encoding"); res.StatusCode != 200 || got != want {
			t.Errorf("%d bytes: got %s, encoding %q, want encoding %q", length, res.Status, got, want)
		}
	}
}

func TestErrorsAreMappedForCallers(t *testing.T) {
	t.Parallel()
	const secret = "secret: relation orders, host db-1"
	tests := map[string]struct {
		err     error
		code    connect.Code
		message string
		logged  string // level at which the text of err is logged
	}{
		"a connect error passes": {
			connect.NewError(connect.CodeNotFound, "no such order"), connect.CodeNotFound, "no such order", "DEBUG",
		},
		"a wrapped connect error passes without the wrapping": {
			fmt.Errorf(secret+": %w", connect.NewError(connect.CodeNotFound, "no such order")),
			connect.CodeNotFound, "no such order", "DEBUG",
		},
		"another server's error is internal": {
			connect.NewError(connect.CodeNotFound, secret).WithRemote(), connect.CodeInternal, "internal error",
			"ERROR",
		},
		"backlog full": {
			fmt.Errorf(secret+": %w", outbox.ErrBacklogFull), connect.CodeResourceExhausted,
			"the backlog is full; nothing was done, try again later", "WARN",
		},
		"database away": {
			fmt.Errorf(secret+": %w", postgres.ErrUnavailable), connect.CodeUnavailable,
			"database is unavailable, try again", "WARN",
		},
		"outcome unknown": {
			fmt.Errorf(secret+": %w", postgres.ErrOutcomeUnknown), connect.CodeUnavailable,
			"the outcome is unknown: the call may or may not have been executed; repeat it with the same ID, which " +
				"is safe",
			"WARN",
		},
		"anything else is internal": {errors.New(secret), connect.CodeInternal, "internal error", "ERROR"},
		"an inner deadline is internal": {
			fmt.Errorf(secret+": %w", context.DeadlineExceeded), connect.CodeInternal, "internal error", "ERROR",
		},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			server := serve(t, rpcserver.Config{},
				unary(func(context.Context, string) (string, error) { return "", test.err }),
				stream(func(_ context.Context, _ string, send func(string) error) error {
					return errors.Join(send("first"), test.err)
				}))
			for _, transport := range transports {
				client := server.client(t, transport.http2, transport.options...)
				_, err := call(t.Context(), client, "")
				wantError(t, err, test.code, test.message)
				_, err = receiveAll(t.Context(), client, "")
				wantError(t, err, test.code, test.message)
			}
			calls := 2 * len(transports)
			if n := strings.Count(server.logs.String(), "level="+test.logged+` msg="rpc failed"`); n != calls {
				t.Errorf("%d calls were logged %d times at %s:\n%s", calls, n, test.logged, server.logs)
			}
		})
	}
}

func TestPanicIsInternalAndTheServerContinues(t *testing.T) {
	t.Parallel()
	server := serve(t, rpcserver.Config{},
		unary(func(_ context.Context, in string) (string, error) {
			if in == "panic" {
				panic("secret")
			}
			return in, nil
		}),
		stream(func(context.Context, string, func(string) error) error { panic("secret") }))
	client := server.client(t, true, connecthttp.WithGRPC())
	_, err := call(t.Context(), client, "panic")
	wantError(t, err, connect.CodeInternal, "internal error")
	_, err = receiveAll(t.Context(), client, "")
	wantError(t, err, connect.CodeInternal, "internal error")
	if out, err := call(t.Context(), client, "hello"); err != nil || out != "hello" {
		t.Errorf("after the panics: got %q, %v", out, err)
	}
	if n := strings.Count(server.logs.String(), "rpc panicked"); n != 2 {
		t.Errorf("2 panics were logged %d times", n)
	}
}

// announced has a deadline that the client sends but does not enforce itself. So the deadline always passes in the
// handler.
type announced struct {
	context.Context
	deadline time.Time
}

func (a announced) Deadline() (time.Time, bool) { return a.deadline, true }

func TestTheCallersDeadlineReachesTheHandler(t *testing.T) {
	t.Parallel()
	ended := make(chan error, 1)
	server := serve(t, rpcserver.Config{}, unary(func(ctx context.Context, _ string) (string, error) {
		<-ctx.Done()
		ended <- ctx.Err()
		return "", fmt.Errorf("secret: %w", ctx.Err())
	}))
	for _, http2 := range []bool{false, true} {
		ctx := announced{t.Context(), time.Now().Add(time.Second)}
		_, err := call(ctx, server.client(t, http2), "")
		wantError(t, err, connect.CodeDeadlineExceeded, "")
		if err := <-ended; err == nil {
			t.Error("the handler's context has no error")
		}
	}
}

func TestReadLimit(t *testing.T) {
	t.Parallel()
	const limit = 64 << 10
	ignore := func(context.Context, string) (string, error) { return "", nil }
	server := serve(t, rpcserver.Config{ReadMaxBytes: limit}, unary(ignore))
	for _, transport := range transports {
		t.Run(transport.name, func(t *testing.T) {
			t.Parallel()
			client := server.client(t, transport.http2, transport.options...)
			fits := strings.Repeat("x", limit-16) // leaves room for the field's tag and length
			if _, err := call(t.Context(), client, fits); err != nil {
				t.Errorf("message within the limit: %v", err)
			}
			_, err := call(t.Context(), client, strings.Repeat("x", limit+1))
			wantError(t, err, connect.CodeResourceExhausted, "")
		})
	}
	t.Run("decompression bomb", func(t *testing.T) {
		t.Parallel()
		var bomb bytes.Buffer
		compress := gzip.NewWriter(&bomb)
		if _, err := io.CopyN(compress, zeros{}, 100*limit); err != nil || compress.Close() != nil {
			t.Fatal(err)
		}
		if bomb.Len() > limit+1<<10 {
			t.Fatalf("bomb has %d bytes, so it would be refused for its compressed size", bomb.Len())
		}
		req, _ := http.NewRequestWithContext(t.Context(), http.MethodPost, server.url+unarySpec.Procedure, &bomb)
		req.Header.Set("Content-Type", "application/proto")
		req.Header.Set("Content-Encoding", "gzip")
		res, err := httpClient(t, false).Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		if body, _ := io.ReadAll(res.Body); !bytes.Contains(body, []byte(`"resource_exhausted"`)) {
			t.Errorf("got %s %s", res.Status, body)
		}
	})
	t.Run("message that claims 4 GiB", func(t *testing.T) {
		t.Parallel()
		body := &counted{r: io.MultiReader(strings.NewReader("\x00\xff\xff\xff\xff"), zeros{})}
		req, _ := http.NewRequestWithContext(t.Context(), http.MethodPost, server.url+unarySpec.Procedure, body)
		req.Header.Set("Content-Type", "application/grpc-web+proto")
		res, err := httpClient(t, true).Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		trailers, _ := io.ReadAll(res.Body)
		if !bytes.Contains(trailers, []byte("grpc-status: 8")) && res.Header.Get("Grpc-Status") != "8" {
			t.Errorf("got %s %v", trailers, res.Header)
		}
		// HTTP/2's flow control lets the client send about a megabyte ahead of the reader.
		if n := body.n.Load(); n > 4<<20 {
			t.Errorf("server read %d bytes of a message, the limit is %d", n, limit)
		}
	})
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}

type counted struct {
	r io.Reader
	n atomic.Int64
}

func (c *counted) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n.Add(int64(n))
	return n, err
}

func TestSlowBodyIsCutOffAndSlowHandlerIsNot(t *testing.T) {
	t.Parallel()
	const bodyTimeout = 500 * time.Millisecond // enough for the body of a fast caller, even on a busy machine
	config := rpcserver.Config{BodyTimeout: bodyTimeout}
	server := serve(t, config, unary(func(ctx context.Context, in string) (string, error) {
		select {
		case <-ctx.Done():
			return "", ctx.Err()
		case <-time.After(3 * bodyTimeout): // work that takes longer than a body may
			return in, nil
		}
	}))
	for _, http2 := range []bool{false, true} {
		t.Run(fmt.Sprintf("http2=%v", http2), func(t *testing.T) {
			t.Parallel()
			if out, err := call(t.Context(), server.client(t, http2), "hello"); err != nil || out != "hello" {
				t.Errorf("slow handler: got %q, %v", out, err)
			}
			body, feed := io.Pipe()
			defer feed.Close()
			req, _ := http.NewRequestWithContext(t.Context(), http.MethodPost, server.url+unarySpec.Procedure, body)
			req.Header.Set("Content-Type", "application/json")
			res, err := httpClient(t, http2).Do(req)
			if err != nil {
				t.Fatal(err)
			}
			defer res.Body.Close()
			text, _ := io.ReadAll(res.Body)
			if want := `{"code":"deadline_exceeded","message":"request did not arrive in time"}`; string(text) != want {
				t.Errorf("slow body: got %s", text)
			}
		})
	}
}

func TestSlowHeadersAreCutOff(t *testing.T) {
	t.Parallel()
	server := serve(t, rpcserver.Config{ReadHeaderTimeout: 50 * time.Millisecond}, unary(echo))
	conn, err := net.Dial("tcp", server.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	fmt.Fprintf(conn, "POST %s HTTP/1.1\r\nHost: x\r\n", unarySpec.Procedure)
	if err := conn.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if _, err := bufio.NewReader(conn).ReadByte(); err == nil || errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v, want a closed connection", err)
	}
}

// TestInvalidRequestNeverReachesTheHandler builds a message with a validation rule at run time.
func TestInvalidRequestNeverReachesTheHandler(t *testing.T) {
	t.Parallel()
	message := messageWithRule(t)
	spec := connect.Spec{Procedure: "/probe.v1.Probe/Validated", StreamType: connect.StreamTypeUnary}
	handle := func(_ context.Context, _ connect.Spec, stream connect.ServerStream) error {
		in := dynamicpb.NewMessage(message)
		if err := stream.Receive(in); err != nil {
			return err
		}
		return stream.Send(in)
	}
	server := serve(t, rpcserver.Config{}, func(s *connect.Server) {
		s.Register(connect.Method{Spec: spec, Handler: handle})
	})
	send := func(value string) error {
		in := dynamicpb.NewMessage(message)
		in.Set(message.Fields().ByName("name"), protoreflect.ValueOfString(value))
		return server.client(t, false).CallUnary(t.Context(), spec, in, dynamicpb.NewMessage(message))
	}
	if err := send("abc"); err != nil {
		t.Errorf("valid: %v", err)
	}
	err := send("")
	wantError(t, err, connect.CodeInvalidArgument, "")
	var invalid *connect.Error
	if !errors.As(err, &invalid) || len(invalid.Details()) != 1 {
		t.Fatalf("got %v, want one detail", err)
	}
	detail, err := connectproto.UnmarshalErrorDetail(invalid.Details()[0])
	if err != nil {
		t.Fatal(err)
	}
	violations := detail.(*validate.Violations).GetViolations()
	if len(violations) != 1 || violations[0].GetField().GetElements()[0].GetFieldName() != "name" {
		t.Errorf("got violations %v", violations)
	}
}

func messageWithRule(t *testing.T) protoreflect.MessageDescriptor {
	t.Helper()
	options := new(descriptorpb.FieldOptions)
	proto.SetExtension(options, validate.E_Field, &validate.FieldRules{Required: proto.Bool(true)})
	file, err := protodesc.NewFile(&descriptorpb.FileDescriptorProto{
		Name: proto.String("probe/v1/probe.proto"), Package: proto.String("probe.v1"), Syntax: proto.String("proto3"),
		MessageType: []*descriptorpb.DescriptorProto{{
			Name: proto.String("Named"),
			Field: []*descriptorpb.FieldDescriptorProto{{
				Name: proto.String("name"), Number: proto.Int32(1), Options: options,
				Type:  descriptorpb.FieldDescriptorProto_TYPE_STRING.Enum(),
				Label: descriptorpb.FieldDescriptorProto_LABEL_OPTIONAL.Enum(),
			}},
		}},
	}, nil)
	if err != nil {
		t.Fatal(err)
	}
	return file.Messages().ByName("Named")
}

func TestReflectionListsServices(t *testing.T) {
	t.Parallel()
	server := serve(t, rpcserver.Config{}, unary(echo))
	reflection, err := reflectionv1.NewServerReflectionClient(server.grpc(t)).ServerReflectionInfo(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := reflection.Send(&reflectionv1.ServerReflectionRequest{
		MessageRequest: &reflectionv1.ServerReflectionRequest_ListServices{},
	}); err != nil {
		t.Fatal(err)
	}
	res, err := reflection.Recv()
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, service := range res.GetListServicesResponse().GetService() {
		names = append(names, service.GetName())
	}
	// The probe has no descriptor, so it cannot be listed.
	if want := "grpc.health.v1.Health"; !slices.Contains(names, want) {
		t.Errorf("services %q lack %s", names, want)
	}
}

func TestUnknownMethodIsUnimplemented(t *testing.T) {
	t.Parallel()
	server := serve(t, rpcserver.Config{}, unary(echo))
	err := server.grpc(t).Invoke(t.Context(), "/probe.v1.Probe/None", wrapperspb.String(""),
		new(wrapperspb.StringValue))
	if status.Code(err) != codes.Unimplemented {
		t.Errorf("got %v", err)
	}
}
