// Package bounds limits the memory that decoding a message takes, the size of errors, and the parts of URLs that errors
// and logs show. Transports and consumers share it, so that the same limits apply everywhere.
package bounds

import (
	"errors"
	"fmt"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// MaxFields is the largest number of fields, list elements and map entries in one message, including its nested
// messages. A limit of bytes alone does not bound the memory: an empty element takes two bytes on the wire and about
// a hundred in memory, so 4 MiB of empty elements decode to 200 MiB.
const MaxFields = 1 << 16

// ErrTooManyFields means that a message has more than MaxFields fields.
var ErrTooManyFields = fmt.Errorf("message has more than %d fields and elements", MaxFields)

// errMalformed stops the count. The decoder finds the same fault and describes it.
var errMalformed = errors.New("malformed")

// FieldBytes is the approximate memory of an element or field. It may take only two bytes on the wire.
const FieldBytes = 128

// Unmarshal decodes protobuf's binary encoding. It returns ErrTooManyFields before it allocates anything.
func Unmarshal(body []byte, message proto.Message) error {
	if len(body) > MaxFields { // a shorter body cannot have more fields
		if _, err := Fields(body, message); err != nil {
			return err
		}
	}
	return proto.Unmarshal(body, message)
}

// smallBody is the size in bytes up to which Fields estimates instead of counting.
const smallBody = 4 << 10

// Fields returns the number of fields in body, which is the binary encoding of a message, or ErrTooManyFields. For a
// small body it returns an estimate.
func Fields(body []byte, message proto.Message) (int, error) {
	if len(body) <= smallBody {
		return len(body) / 2, nil
	}
	left := MaxFields
	if err := count(body, message.ProtoReflect().Descriptor(), &left); errors.Is(err, ErrTooManyFields) {
		return 0, err
	}
	return MaxFields - left, nil
}

// count subtracts the number of fields in body from left.
func count(body []byte, descriptor protoreflect.MessageDescriptor, left *int) error {
	for len(body) > 0 {
		number, kind, n := protowire.ConsumeTag(body)
		if n < 0 {
			return errMalformed
		}
		body = body[n:]
		n = protowire.ConsumeFieldValue(number, kind, body)
		if n < 0 {
			return errMalformed
		}
		if err := countValue(body[:n], kind, descriptor.Fields().ByNumber(number), left); err != nil {
			return err
		}
		body = body[n:]
	}
	return nil
}

// countValue counts one field and the fields in its value.
func countValue(value []byte, kind protowire.Type, field protoreflect.FieldDescriptor, left *int) error {
	if *left--; *left < 0 {
		return ErrTooManyFields
	}
	switch {
	case field == nil: // unknown fields stay bytes
		return nil
	case kind == protowire.BytesType && field.Message() != nil:
		value, _ = protowire.ConsumeBytes(value)
		return count(value, field.Message(), left)
	case kind == protowire.StartGroupType && field.Message() != nil:
		value, _ = protowire.ConsumeGroup(field.Number(), value)
		return count(value, field.Message(), left)
	case kind == protowire.BytesType && field.IsList() && packable(field.Kind()):
		value, _ = protowire.ConsumeBytes(value)
		return countPacked(value, field.Kind(), left)
	}
	return nil
}

func packable(kind protoreflect.Kind) bool {
	return kind != protoreflect.StringKind && kind != protoreflect.BytesKind
}

// countPacked counts the numbers in a packed list.
func countPacked(list []byte, kind protoreflect.Kind, left *int) error {
	switch kind {
	case protoreflect.Fixed32Kind, protoreflect.Sfixed32Kind, protoreflect.FloatKind:
		*left -= len(list) / 4
	case protoreflect.Fixed64Kind, protoreflect.Sfixed64Kind, protoreflect.DoubleKind:
		*left -= len(list) / 8
	default:
		for _, b := range list {
			if b < 0x80 { // the last byte of a varint
				*left--
			}
		}
	}
	if *left < 0 {
		return ErrTooManyFields
	}
	return nil
}

// JSONFields returns an upper bound on the number of values in text, a message as JSON, or ErrTooManyFields.
func JSONFields(text []byte) (int, error) {
	values, quoted := 1, false
	for i := 0; i < len(text) && values <= MaxFields; i++ {
		switch c := text[i]; {
		case quoted && c == '\\':
			i++
		case c == '"':
			quoted = !quoted
		case !quoted && (c == ',' || c == '{' || c == '['):
			values++
		}
	}
	if values > MaxFields {
		return 0, ErrTooManyFields
	}
	return values, nil
}
