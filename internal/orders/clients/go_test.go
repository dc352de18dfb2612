package clients

import (
	"context"
	"errors"
	"io"
	"strings"
	"testing"

	"buf.build/gen/go/bufbuild/protovalidate/protocolbuffers/go/buf/validate"
	"buf.build/go/protovalidate"
	"connectrpc.com/connect/v2"
	"connectrpc.com/connect/v2/connecthttp"
	"connectrpc.com/connect/v2/connectproto"
	ordersv1 "example.com/shop/internal/gen/orders/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
)

func (c call) procedure() string { return "/orders.v1.OrderService/" + c.method }

func (c call) context(t *testing.T) (context.Context, context.CancelFunc) {
	if c.timeout == 0 {
		return context.WithCancel(t.Context())
	}
	return context.WithTimeout(t.Context(), c.timeout)
}

// response returns an empty response message.
func (c call) response(t *testing.T) proto.Message {
	t.Helper()
	service, err := protoregistry.GlobalFiles.FindDescriptorByName("orders.v1.OrderService")
	if err != nil {
		t.Fatal(err)
	}
	method := service.(protoreflect.ServiceDescriptor).Methods().ByName(protoreflect.Name(c.method))
	kind, err := protoregistry.GlobalTypes.FindMessageByName(method.Output().FullName())
	if err != nil {
		t.Fatal(err)
	}
	return kind.New().Interface()
}

// receive records the messages that next decodes, until next returns an error. It returns that error, or nil for
// io.EOF.
func (o *outcome) receive(t *testing.T, c call, next func(response proto.Message) error) error {
	for {
		response := c.response(t)
		if err := next(response); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
		o.record(response.(interface{ GetOrder() *ordersv1.Order }).GetOrder().GetStatus().String())
		if c.heard != nil && len(o.Statuses) == 1 {
			c.heard()
		}
	}
}

func (o *outcome) record(status string) {
	o.Statuses = append(o.Statuses, strings.TrimPrefix(status, "ORDER_STATUS_"))
}

func (o *outcome) violate(details ...any) {
	for _, detail := range details {
		violations, _ := detail.(*validate.Violations)
		for _, violation := range violations.GetViolations() {
			o.Violations = append(o.Violations, protovalidate.FieldPathString(violation.GetField()))
		}
	}
}

// once makes a unary call look like a stream of one message.
func once(answer func(response proto.Message) error) func(response proto.Message) error {
	given := false
	return func(response proto.Message) error {
		if given {
			return io.EOF
		}
		given = true
		return answer(response)
	}
}

func callGRPC(t *testing.T, addr string, c call) (o outcome) {
	conn, err := grpc.NewClient(addr, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	ctx, cancel := c.context(t)
	defer cancel()
	for name, value := range headers {
		ctx = metadata.AppendToOutgoingContext(ctx, name, value)
	}
	next := once(func(response proto.Message) error { return conn.Invoke(ctx, c.procedure(), c.request, response) })
	if c.stream {
		stream, err := conn.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true}, c.procedure())
		if err == nil {
			err = errors.Join(stream.SendMsg(c.request), stream.CloseSend())
		}
		if err != nil {
			t.Fatal(err)
		}
		next = func(response proto.Message) error { return stream.RecvMsg(response) }
	}
	answer := status.Convert(o.receive(t, c, next))
	o.Code = codeName(connect.Code(answer.Code()))
	o.violate(answer.Details()...)
	return o
}

func callConnect(options ...connecthttp.Option) func(t *testing.T, addr string, c call) outcome {
	return func(t *testing.T, addr string, c call) (o outcome) {
		client := connectClient(t, addr, options...)
		ctx, cancel := c.context(t)
		defer cancel()
		spec := connect.Spec{Procedure: c.procedure(), StreamType: connect.StreamTypeUnary}
		next := once(func(response proto.Message) error { return client.CallUnary(ctx, spec, c.request, response) })
		if c.stream {
			spec.StreamType = connect.StreamTypeServer
			stream, err := client.CallServerStream(ctx, spec, c.request)
			if err != nil {
				t.Fatal(err)
			}
			defer stream.Close()
			next = func(response proto.Message) error { return stream.Receive(response) }
		}
		err := o.receive(t, c, next)
		if o.Code = "ok"; err == nil {
			return o
		}
		o.Code = connect.CodeOf(err).String()
		var answer *connect.Error
		if errors.As(err, &answer) {
			for _, detail := range answer.Details() {
				message, err := connectproto.UnmarshalErrorDetail(detail)
				if err != nil {
					t.Fatal(err)
				}
				o.violate(message)
			}
		}
		return o
	}
}

// codeName returns Connect's name of a code, and "ok" for success, for which Connect has no name.
func codeName(code connect.Code) string {
	if code == 0 {
		return "ok"
	}
	return code.String()
}
