package console

import (
	"encoding/hex"

	"example.com/shop/internal/bounds"
	opsv1 "example.com/shop/internal/gen/ops/v1"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
)

// Limits of the payload on a page.
const (
	maxText = 64 << 10 // bytes of JSON
	maxDump = 4 << 10  // bytes of payload; the dump is five times as long
)

// show returns a payload as JSON, if its type is linked in and the bytes decode, else as hex.
func show(typeName string, payload []byte) *opsv1.Payload {
	p := &opsv1.Payload{Size: int32(len(payload))}
	if text, ok := decode(typeName, payload); ok {
		p.Text, p.Decoded = text, true
		if p.Cut = len(text) > maxText; p.Cut {
			p.Text = string([]rune(text[:maxText])) // the conversion replaces a truncated rune
		}
		return p
	}
	p.Cut = len(payload) > maxDump
	p.Text = hex.Dump(payload[:min(len(payload), maxDump)])
	return p
}

func decode(typeName string, payload []byte) (string, bool) {
	kind, err := protoregistry.GlobalTypes.FindMessageByName(protoreflect.FullName(typeName))
	if err != nil {
		return "", false
	}
	message := kind.New().Interface()
	if err := bounds.Unmarshal(payload, message); err != nil {
		return "", false
	}
	text, err := protojson.MarshalOptions{Multiline: true}.Marshal(message)
	return string(text), err == nil
}
