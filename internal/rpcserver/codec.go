package rpcserver

import (
	"bytes"
	"context"
	"fmt"
	"io"

	"connectrpc.com/connect/v2"
	"connectrpc.com/connect/v2/connectproto"
	"example.com/shop/internal/bounds"
	"google.golang.org/protobuf/proto"
)

// maxDepth is the deepest nesting of a message, as in most implementations of protobuf. Go's own limit is 10,000.
const maxDepth = 100

// boundedCodec refuses messages with too many fields before it decodes them, and charges the call for the others.
type boundedCodec struct {
	connect.StableCodec
	fields func(body []byte, message proto.Message) (int, error)
}

// codecs returns the codecs that callers may choose from.
func codecs() []connect.Codec {
	inJSON := func(text []byte, _ proto.Message) (int, error) { return bounds.JSONFields(text) }
	binary := connectproto.NewBinaryCodec()
	binary.UnmarshalOptions.RecursionLimit = maxDepth
	return []connect.Codec{boundedCodec{binary, bounds.Fields}, boundedCodec{newEnumCodec(), inJSON}}
}

// UnmarshalRead implements connect.Codec.
func (c boundedCodec) UnmarshalRead(ctx context.Context, src io.Reader, message any) error {
	decoded, ok := message.(proto.Message)
	if !ok {
		return fmt.Errorf("%w: got %T", connectproto.ErrNotProtoMessage, message)
	}
	buffer, ok := src.(*bytes.Buffer) // Connect passes a buffer
	if !ok {
		buffer = new(bytes.Buffer)
		if _, err := buffer.ReadFrom(src); err != nil {
			return err
		}
	}
	fields, err := c.fields(buffer.Bytes(), decoded)
	if err != nil {
		return err
	}
	if load := loadOf(ctx); load != nil {
		if err := load.decode(buffer.Len(), fields); err != nil {
			return err
		}
	}
	return c.StableCodec.UnmarshalRead(ctx, buffer, message)
}
