// Package unary reads the request of a unary call, and runs a unary call in memory. Interceptors that store requests or
// responses need the former. Calls that come from the database instead of a network need the latter.
//
// It is a package of its own because idempotency, operations and conformance share it.
package unary

import (
	"crypto/sha256"
	"fmt"
	"io"

	"connectrpc.com/connect/v2"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/descriptorpb"
	"google.golang.org/protobuf/types/dynamicpb"
)

// Describe returns the descriptor and the options of a procedure. Both are nil if spec does not come from a proto file.
func Describe(spec connect.Spec) (protoreflect.MethodDescriptor, *descriptorpb.MethodOptions) {
	method, ok := spec.Schema.(protoreflect.MethodDescriptor)
	if !ok {
		return nil, nil
	}
	options, _ := method.Options().(*descriptorpb.MethodOptions)
	return method, options
}

// Receive reads the request of a unary call of method.
func Receive(method protoreflect.MethodDescriptor, stream connect.ServerStream) (proto.Message, error) {
	request := New(method.Input())
	return request, stream.Receive(request)
}

// New returns an empty message, of the generated type if it exists.
func New(descriptor protoreflect.MessageDescriptor) proto.Message {
	if kind, err := protoregistry.GlobalTypes.FindMessageByName(descriptor.FullName()); err == nil {
		return kind.New().Interface()
	}
	return dynamicpb.NewMessage(descriptor)
}

// Hash returns a hash that identifies a request. It does not depend on the encoding that the caller used.
func Hash(request proto.Message) ([]byte, error) {
	text, err := proto.MarshalOptions{Deterministic: true}.Marshal(request)
	if err != nil {
		return nil, fmt.Errorf("encode request: %w", err)
	}
	hash := sha256.Sum256(text)
	return hash[:], nil
}

// Stream is a unary call in memory. Only one goroutine may use it.
type Stream struct {
	// Request is the message that the handler receives.
	Request proto.Message
	// Response is the message that the handler sent, or nil.
	Response proto.Message

	received bool
}

var _ connect.ServerStream = (*Stream)(nil)

// Receive implements connect.ServerStream.
func (s *Stream) Receive(message any) error {
	into, ok := message.(proto.Message)
	switch {
	case s.received:
		return io.EOF
	case !ok:
		return fmt.Errorf("cannot receive into %T", message)
	}
	s.received = true
	proto.Reset(into)
	proto.Merge(into, s.Request)
	return nil
}

// SendHeaders implements connect.ServerStream.
func (s *Stream) SendHeaders() error { return nil }

// Send implements connect.ServerStream.
func (s *Stream) Send(message any) error {
	response, ok := message.(proto.Message)
	if !ok || s.Response != nil {
		return fmt.Errorf("cannot send %T", message)
	}
	s.Response = response
	return nil
}
