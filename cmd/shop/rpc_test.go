package main

import (
	"context"
	"encoding/json"
	"net"
	"strings"
	"testing"

	"connectrpc.com/connect/v2"
	"example.com/shop/internal/rpcserver"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/descriptorpb"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// health serves gRPC's health service, whose schema is linked into this program.
func health(s *connect.Server) {
	spec := connect.Spec{Procedure: healthv1.Health_Check_FullMethodName}
	handler := func(ctx context.Context, _ connect.Spec, stream connect.ServerStream) error {
		request := new(healthv1.HealthCheckRequest)
		if err := stream.Receive(request); err != nil {
			return err
		}
		if info, _ := connect.CallInfoForServerContext(ctx); info.RequestHeader().Get("Authorization") != "token" {
			return connect.NewError(connect.CodeUnauthenticated, "no token for "+request.GetService())
		}
		return stream.Send(&healthv1.HealthCheckResponse{Status: healthv1.HealthCheckResponse_SERVING})
	}
	s.Register(connect.Method{Spec: spec, Handler: handler})
}

// serveHTTP serves until the test ends, and returns the URL.
func serveHTTP(t *testing.T, register func(*connect.Server)) string {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := rpcserver.New(rpcserver.Config{}, register)
	run(t, func(ctx context.Context) error { return server.Serve(ctx, listener) })
	return "http://" + listener.Addr().String()
}

func run(t *testing.T, serve func(context.Context) error) {
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		if err := serve(ctx); err != nil {
			t.Error(err)
		}
	}()
	t.Cleanup(func() {
		cancel()
		<-ended
	})
}

func TestRPCCallOverHTTP(t *testing.T) {
	t.Parallel()
	// rpcserver has its own health service.
	url := serveHTTP(t, func(*connect.Server) {})
	status, stdout, stderr := call(t, nil, "rpc", "call", "/grpc.health.v1.Health/Check", "--http", url)
	if status != 0 {
		t.Fatal(stderr)
	}
	wantJSON(t, stdout, "status", "SERVING")
	for args, want := range map[string]string{
		"grpc.health.v1.Health/None":                     "has no method None",
		"grpc.health.v1.Health/Watch":                    "is a stream",
		"grpc.health.v1.Health/Check --data={":           "--data is not a grpc.health.v1.HealthCheckRequest",
		"grpc.health.v1.HealthCheckRequest/Check":        "is not a service",
		"unknown.v1.None/None --http=http://127.0.0.1:1": "find service unknown.v1.None",
	} {
		status, _, stderr := call(t, nil, strings.Fields("rpc call "+args)...)
		if status != 1 || strings.Count(stderr, "\n") != 1 || !strings.Contains(stderr, want) {
			t.Errorf("%s: exit status %d, %q", args, status, stderr)
		}
	}
}

// The schema of a service that is not linked into this program comes from the server, with its imports.
func TestRPCCallAsksForTheSchema(t *testing.T) {
	t.Parallel()
	const text = ".google.protobuf.StringValue"
	file, err := protodesc.NewFile(&descriptorpb.FileDescriptorProto{
		Name: proto.String("probe/v1/probe.proto"), Package: proto.String("probe.v1"), Syntax: proto.String("proto3"),
		Dependency: []string{"google/protobuf/wrappers.proto"},
		Service: []*descriptorpb.ServiceDescriptorProto{{
			Name: proto.String("Probe"),
			Method: []*descriptorpb.MethodDescriptorProto{
				{Name: proto.String("Echo"), InputType: proto.String(text), OutputType: proto.String(text)},
			},
		}},
	}, protoregistry.GlobalFiles)
	if err != nil {
		t.Fatal(err)
	}
	if err := protoregistry.GlobalFiles.RegisterFile(file); err != nil { // only in this process
		t.Fatal(err)
	}
	url := serveHTTP(t, func(s *connect.Server) {
		spec := connect.Spec{Procedure: "/probe.v1.Probe/Echo", Schema: file.Services().Get(0).Methods().Get(0)}
		echo := func(_ context.Context, _ connect.Spec, stream connect.ServerStream) error {
			in := new(wrapperspb.StringValue)
			if err := stream.Receive(in); err != nil {
				return err
			}
			return stream.Send(in)
		}
		s.Register(connect.Method{Spec: spec, Handler: echo})
	})
	status, stdout, stderr := call(t, nil, "rpc", "call", "probe.v1.Probe/Echo", "--data", `"hello"`, "--http", url)
	if status != 0 || strings.TrimSpace(stdout) != `"hello"` {
		t.Errorf("exit status %d, %q %q", status, stdout, stderr)
	}
}

func wantJSON(t *testing.T, text, name, want string) {
	t.Helper()
	var values map[string]any
	if err := json.Unmarshal([]byte(text), &values); err != nil || values[name] != want {
		t.Errorf("got %q, %v", text, err)
	}
}
