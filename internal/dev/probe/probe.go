// Package probe is a service of well-known types, for tests of what stands around handlers: it does not depend on anybody's domain.
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
	// Mutate is declared IDEMPOTENT and honours keys, as is Slow.
	Mutate, Slow connect.Spec
	// Plain declares nothing.
	Plain connect.Spec
	// Read is declared NO_SIDE_EFFECTS.
	Read connect.Spec
	// Follow is a stream of responses.
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
		Name: proto.String("probe/durable/v1/probe.proto"), Package: proto.String("probe.durable.v1"), Syntax: proto.String("proto3"),
		Dependency: []string{"google/protobuf/wrappers.proto"},
		Service: []*descriptorpb.ServiceDescriptorProto{{Name: proto.String("Probe"), Method: []*descriptorpb.MethodDescriptorProto{
			method("Mutate", withKey()), method("Slow", withKey()), method("Plain", nil),
			method("Read", &descriptorpb.MethodOptions{IdempotencyLevel: reads}),
			method("Follow", &descriptorpb.MethodOptions{IdempotencyLevel: idempotent}),
		}}},
	}, protoregistry.GlobalFiles)
	if err == nil {
		err = protoregistry.GlobalFiles.RegisterFile(file)
	}
	if err != nil {
		panic(err)
	}
	methods := file.Services().Get(0).Methods()
	for i, spec := range []*connect.Spec{&Mutate, &Slow, &Plain, &Read, &Follow} {
		one := methods.Get(i)
		*spec = connect.Spec{Procedure: "/" + service + "/" + string(one.Name()), Schema: one}
		if level := one.Options().(*descriptorpb.MethodOptions); level != nil {
			spec.IdempotencyLevel = map[descriptorpb.MethodOptions_IdempotencyLevel]connect.IdempotencyLevel{
				*idempotent: connect.IdempotencyIdempotent, *reads: connect.IdempotencyNoSideEffects,
			}[level.GetIdempotencyLevel()]
		}
	}
	Follow.StreamType = connect.StreamTypeServer
}

// Handle serves a method by fn.
func Handle(server *connect.Server, spec connect.Spec, fn func(ctx context.Context, text string) (string, error)) {
	server.Register(connect.Method{Spec: spec, Handler: func(ctx context.Context, _ connect.Spec, stream connect.ServerStream) error {
		var request wrapperspb.StringValue
		if err := stream.Receive(&request); err != nil {
			return err
		}
		response, err := fn(ctx, request.GetValue())
		if err != nil {
			return err
		}
		return stream.Send(wrapperspb.String(response))
	}})
}

// Call calls a unary method.
func Call(ctx context.Context, client *connect.Client, spec connect.Spec, text string) (string, error) {
	var response wrapperspb.StringValue
	err := client.CallUnary(ctx, spec, wrapperspb.String(text), &response)
	return response.GetValue(), err
}
