// Package unary takes a unary call apart into messages and makes it of messages: for interceptors that keep a request or a response, and for
// calls that come from the database instead of a network.
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

// Describe returns what the proto file says of a procedure, and its options. It returns nil if spec does not come of a proto file.
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

// New makes an empty message: of the generated type, if there is one.
func New(descriptor protoreflect.MessageDescriptor) proto.Message {
	if kind, err := protoregistry.GlobalTypes.FindMessageByName(descriptor.FullName()); err == nil {
		return kind.New().Interface()
	}
	return dynamicpb.NewMessage(descriptor)
}

// Hash tells one request from another, however they were encoded.
func Hash(request proto.Message) ([]byte, error) {
	text, err := proto.MarshalOptions{Deterministic: true}.Marshal(request)
	if err != nil {
		return nil, fmt.Errorf("encode request: %w", err)
	}
	hash := sha256.Sum256(text)
	return hash[:], nil
}

// Stream is a unary call in memory. It belongs to one goroutine.
type Stream struct {
	// Request is what the handler will receive.
	Request proto.Message
	// Response is what it sent, nil if it has sent nothing.
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
