// Package probe is a service of well-known types. Tests of the code around handlers use it, because it does not depend
// on a domain.
package probe

import (
	"context"

	"connectrpc.com/connect/v2"
	authv1 "example.com/shop/internal/gen/auth/v1"
	idempotencyv1 "example.com/shop/internal/gen/idempotency/v1"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/descriptorpb"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

const service = "probe.durable.v1.Probe"

// The methods take a google.protobuf.StringValue and return one. Any caller with credentials may call them.
var (
	// Mutate and Slow are declared IDEMPOTENT and accept idempotency keys.
	Mutate, Slow connect.Spec
	// Plain has no declared idempotency.
	Plain connect.Spec
	// Read is declared NO_SIDE_EFFECTS.
	Read connect.Spec
	// Follow streams responses.
	Follow connect.Spec
)

func init() {
	idempotent, reads := descriptorpb.MethodOptions_IDEMPOTENT.Enum(), descriptorpb.MethodOptions_NO_SIDE_EFFECTS.Enum()
	withKey := func() *descriptorpb.MethodOptions {
		options := &descriptorpb.MethodOptions{IdempotencyLevel: idempotent}
		proto.SetExtension(options, idempotencyv1.E_Key, true)
		return options
	}
	method := func(name string, options *descriptorpb.MethodOptions) *descriptorpb.MethodDescriptorProto {
		if options == nil {
			options = &descriptorpb.MethodOptions{}
		}
		proto.SetExtension(options, authv1.E_Access, &authv1.Access{Authenticated: true})
		const text = ".google.protobuf.StringValue"
		return &descriptorpb.MethodDescriptorProto{
			Name: proto.String(name), InputType: proto.String(text), OutputType: proto.String(text), Options: options,
			ServerStreaming: proto.Bool(name == "Follow"),
		}
	}
	file, err := protodesc.NewFile(&descriptorpb.FileDescriptorProto{
		Name: proto.String("probe/durable/v1/probe.proto"), Package: proto.String("probe.durable.v1"),
		Syntax: proto.String("proto3"), Dependency: []string{"google/protobuf/wrappers.proto"},
		Service: []*descriptorpb.ServiceDescriptorProto{{
			Name: proto.String("Probe"),
			Method: []*descriptorpb.MethodDescriptorProto{
				method("Mutate", withKey()), method("Slow", withKey()), method("Plain", nil),
				method("Read", &descriptorpb.MethodOptions{IdempotencyLevel: reads}),
				method("Follow", &descriptorpb.MethodOptions{IdempotencyLevel: idempotent}),
			},
		}},
	}, protoregistry.GlobalFiles)
	if err == nil {
		err = protoregistry.GlobalFiles.RegisterFile(file)
	}
	if err != nil {
		panic(err)
	}
	methods := file.Services().Get(0).Methods()
	for i, spec := range []*connect.Spec{&Mutate, &Slow, &Plain, &Read, &Follow} {
		method := methods.Get(i)
		*spec = connect.Spec{Procedure: "/" + service + "/" + string(method.Name()), Schema: method}
		if options := method.Options().(*descriptorpb.MethodOptions); options != nil {
			spec.IdempotencyLevel = map[descriptorpb.MethodOptions_IdempotencyLevel]connect.IdempotencyLevel{
				*idempotent: connect.IdempotencyIdempotent, *reads: connect.IdempotencyNoSideEffects,
			}[options.GetIdempotencyLevel()]
		}
	}
	Follow.StreamType = connect.StreamTypeServer
}

// Handle serves a method with fn.
func Handle(server *connect.Server, spec connect.Spec, fn func(ctx context.Context, text string) (string, error)) {
	handler := func(ctx context.Context, _ connect.Spec, stream connect.ServerStream) error {
		var request wrapperspb.StringValue
		if err := stream.Receive(&request); err != nil {
			return err
		}
		response, err := fn(ctx, request.GetValue())
		if err != nil {
			return err
		}
		return stream.Send(wrapperspb.String(response))
	}
	server.Register(connect.Method{Spec: spec, Handler: handler})
}

// Call calls a unary method.
func Call(ctx context.Context, client *connect.Client, spec connect.Spec, text string) (string, error) {
	var response wrapperspb.StringValue
	err := client.CallUnary(ctx, spec, wrapperspb.String(text), &response)
	return response.GetValue(), err
}
