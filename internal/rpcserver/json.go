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

// enumCodec is Connect's codec for JSON, except that an unknown enum name is an error. Connect's codec drops such
// names together with unknown fields, and a filter from which a value is dropped becomes wider. Unknown fields are
// still ignored, because clients may be newer than the server.
type enumCodec struct {
	*connectproto.JSONCodec
	strict protojson.UnmarshalOptions
}

func newEnumCodec() *enumCodec {
	codec := connectproto.NewJSONCodec()
	codec.UnmarshalOptions.RecursionLimit = maxDepth // checkNames decodes everything below a level once per level
	strict := codec.UnmarshalOptions
	strict.DiscardUnknown = false
	return &enumCodec{codec, strict}
}

// UnmarshalRead implements connect.Codec.
func (c *enumCodec) UnmarshalRead(ctx context.Context, src io.Reader, msg any) error {
	message, ok := msg.(proto.Message)
	if !ok {
		return c.JSONCodec.UnmarshalRead(ctx, src, msg) // returns the error for this case
	}
	var text bytes.Buffer
	if _, err := text.ReadFrom(src); err != nil {
		return err
	}
	if c.strict.Unmarshal(text.Bytes(), message) == nil {
		return nil // the common case: there are no unknown names
	}
	if err := c.JSONCodec.UnmarshalRead(ctx, bytes.NewReader(text.Bytes()), message); err != nil {
		return err
	}
	return checkNames(text.Bytes(), message.ProtoReflect().Descriptor())
}

// specialForms are the files with messages that have a special form in JSON instead of an object with their fields.
// Their only enum is NullValue.
var specialForms = map[string]bool{
	"google/protobuf/any.proto": true, "google/protobuf/duration.proto": true, "google/protobuf/field_mask.proto": true,
	"google/protobuf/struct.proto": true, "google/protobuf/timestamp.proto": true,
	"google/protobuf/wrappers.proto": true,
}

// checkNames returns an error if a known field of a JSON object has a name that its enum does not have. protojson
// must have accepted the text.
func checkNames(text []byte, message protoreflect.MessageDescriptor) error {
	if specialForms[message.ParentFile().Path()] {
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
		return nil // a number, which the rules in the proto file validate
	}
	if field.Enum().Values().ByName(protoreflect.Name(name)) == nil {
		return fmt.Errorf("field %s: unknown value of enum %s", field.FullName(), field.Enum().FullName())
	}
	return nil
}
