package console

import (
	"encoding/hex"

	"example.com/shop/internal/bounds"
	opsv1 "example.com/shop/internal/gen/ops/v1"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
)

// What a page can show of a payload.
const (
	longestText = 64 << 10 // bytes of JSON
	longestDump = 4 << 10  // bytes of payload, of which a dump has five times as many
)

// show makes a payload readable: by its descriptor, if the type is linked in and the bytes are of it, else as hex.
func show(typeName string, payload []byte) *opsv1.Payload {
	p := &opsv1.Payload{Size: int32(len(payload))}
	if text, ok := decode(typeName, payload); ok {
		p.Text, p.Decoded = text, true
		if p.Cut = len(text) > longestText; p.Cut {
			p.Text = string([]rune(text[:longestText])) // mends a rune that was cut
		}
		return p
	}
	p.Cut = len(payload) > longestDump
	p.Text = hex.Dump(payload[:min(len(payload), longestDump)])
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
