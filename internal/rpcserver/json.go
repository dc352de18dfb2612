package rpcserver

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"slices"

	"connectrpc.com/connect/v2/connectproto"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// namingCodec is Connect's codec for JSON, except that a name which an enum does not have is an error. Connect's drops it together with fields that
// it does not know, and what is dropped from a filter widens it. Unknown fields are ignored as before: clients may be newer than the server.
type namingCodec struct {
	*connectproto.JSONCodec
	strict protojson.UnmarshalOptions
}

func newNamingCodec() *namingCodec {
	codec := connectproto.NewJSONCodec()
	codec.UnmarshalOptions.RecursionLimit = maxDepth // names are looked for once a level, in all that is below it
	strict := codec.UnmarshalOptions
	strict.DiscardUnknown = false
	return &namingCodec{codec, strict}
}

// UnmarshalRead implements connect.Codec.
func (c *namingCodec) UnmarshalRead(ctx context.Context, src io.Reader, msg any) error {
	message, ok := msg.(proto.Message)
	if !ok {
		return c.JSONCodec.UnmarshalRead(ctx, src, msg) // which says so
	}
	var text bytes.Buffer
	if _, err := text.ReadFrom(src); err != nil {
		return err
	}
	if c.strict.Unmarshal(text.Bytes(), message) == nil {
		return nil // as nearly always: there is nothing that could be dropped
	}
	if err := c.JSONCodec.UnmarshalRead(ctx, bytes.NewReader(text.Bytes()), message); err != nil {
		return err
	}
	return checkNames(text.Bytes(), message.ProtoReflect().Descriptor())
}

// formsOfTheirOwn are the files whose messages JSON does not write as objects with their fields. None of them has an enum but that of null.
var formsOfTheirOwn = map[string]bool{
	"google/protobuf/any.proto": true, "google/protobuf/duration.proto": true, "google/protobuf/field_mask.proto": true,
	"google/protobuf/struct.proto": true, "google/protobuf/timestamp.proto": true, "google/protobuf/wrappers.proto": true,
}

// checkNames returns an error if a known field of a JSON object names a value that its enum does not have. The text must be one that protojson takes.
func checkNames(text []byte, message protoreflect.MessageDescriptor) error {
	if formsOfTheirOwn[message.ParentFile().Path()] {
		return nil
	}
	var object map[string]json.RawMessage
	if err := json.Unmarshal(text, &object); err != nil {
		return err
	}
	fields := message.Fields()
	for name, value := range object {
		field := fields.ByJSONName(name)
		if field == nil {
			field = fields.ByTextName(name)
		}
		if field == nil {
			continue
		}
		if err := checkField(value, field); err != nil {
			return err
		}
	}
	return nil
}

func checkField(text json.RawMessage, field protoreflect.FieldDescriptor) error {
	var values []json.RawMessage
	switch {
	case field.IsMap():
		var entries map[string]json.RawMessage
		if err := json.Unmarshal(text, &entries); err != nil {
			return err
		}
		values, field = slices.Collect(maps.Values(entries)), field.MapValue()
	case field.IsList():
		if err := json.Unmarshal(text, &values); err != nil {
			return err
		}
	default:
		values = []json.RawMessage{text}
	}
	for _, value := range values {
		if err := checkValue(value, field); err != nil {
			return err
		}
	}
	return nil
}

func checkValue(text json.RawMessage, field protoreflect.FieldDescriptor) error {
	if field.Message() != nil {
		return checkNames(text, field.Message())
	}
	var name string
	if field.Enum() == nil || json.Unmarshal(text, &name) != nil || bytes.Equal(text, []byte("null")) {
		return nil // a number, which the rules of the proto file judge
	}
	if field.Enum().Values().ByName(protoreflect.Name(name)) == nil {
		return fmt.Errorf("field %s: %s has no such value", field.FullName(), field.Enum().FullName())
	}
	return nil
}
