package operations

import (
	"context"
	"fmt"

	"connectrpc.com/connect/v2"
	idempotencyv1 "example.com/shop/internal/gen/idempotency/v1"
	"example.com/shop/internal/unary"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/descriptorpb"
)

// Forward serves the methods of another service that can be called durably, by calling them through client. A worker
// with this server executes their durable calls. service is its full name, such as invoices.v1.InvoiceService, and its
// generated code must be linked in. Forward returns an error if it is not, or if the service has no such method.
//
// A method that takes an Idempotency-Key gets the operation's name, the same in each attempt.
func Forward(server *connect.Server, client *connect.Client, service string) error {
	found, err := protoregistry.GlobalFiles.FindDescriptorByName(protoreflect.FullName(service))
	descriptor, ok := found.(protoreflect.ServiceDescriptor)
	if err != nil || !ok {
		return fmt.Errorf("service %s is not part of this program: import its generated code", service)
	}
	count := 0
	for i := range descriptor.Methods().Len() {
		method := descriptor.Methods().Get(i)
		options, _ := method.Options().(*descriptorpb.MethodOptions)
		if method.IsStreamingClient() || method.IsStreamingServer() ||
			options.GetIdempotencyLevel() != descriptorpb.MethodOptions_IDEMPOTENT {
			continue
		}
		spec := connect.Spec{
			Procedure: fmt.Sprintf("/%s/%s", service, method.Name()), Schema: method,
			IdempotencyLevel: connect.IdempotencyIdempotent,
		}
		server.Register(connect.Method{Spec: spec, Handler: forward(client, spec, method)})
		count++
	}
	if count == 0 {
		return fmt.Errorf("service %s has no unary method with option idempotency_level = IDEMPOTENT", service)
	}
	return nil
}

// nameKey is the key of the operation's name in the context of its call.
type nameKey struct{}

func forward(client *connect.Client, spec connect.Spec, method protoreflect.MethodDescriptor) connect.ServerFunc {
	withKey, _ := proto.GetExtension(method.Options(), idempotencyv1.E_Key).(bool)
	return func(ctx context.Context, _ connect.Spec, stream connect.ServerStream) error {
		request, err := unary.Receive(method, stream)
		if err != nil {
			return err
		}
		name, _ := ctx.Value(nameKey{}).(string)
		ctx, info := connect.NewClientContext(ctx)
		if withKey { // other methods refuse the header
			info.RequestHeader().Set(keyHeader, name)
		}
		response := unary.New(method.Output())
		if err := client.CallUnary(ctx, spec, request, response); err != nil {
			return passing(err)
		}
		return stream.Send(response)
	}
}

// passing turns errors that may pass into unavailable, so that the call is retried: the other service answered late, is
// overloaded, or does not know this service's credentials yet.
func passing(err error) error {
	switch code := connect.CodeOf(err); code {
	case connect.CodeDeadlineExceeded, connect.CodeResourceExhausted, connect.CodeUnauthenticated:
		return connect.Errorf(connect.CodeUnavailable, "the other service: %s", code).WithCause(err)
	}
	return err
}
