// Package messaging contains the types that all other packages share: the outgoing Message, the incoming Delivery, the
// contract of a Publisher, and the error by which a handler rules out retries. It does no I/O.
package messaging

import (
	"errors"
	"fmt"
	"regexp"
	"strings"
	"time"

	"github.com/google/uuid"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// Limits of one message. They are checked before the row is written, by the view outbox_message for writers in other
// languages, and once more by the relay. A message that the broker would refuse must never enter the log.
const (
	// MaxPayload is the largest payload in bytes. RabbitMQ's own default is 16 MiB since 4.0 (128 MiB before). A message
	// should be a fact, not a file.
	MaxPayload = 1 << 20
	// MaxType is the longest message type in bytes. AMQP carries it as the routing key, a short string of 255 bytes.
	MaxType = 255
	// MaxKey is the longest key in bytes.
	MaxKey = 255
	// MaxHeaders is the largest number of headers in one message.
	MaxHeaders = 32
	// MaxHeaderValue is the longest header value in bytes.
	MaxHeaderValue = 1024
)

// KeyHeader is the header that carries the key. A message's own headers must not use this name.
const KeyHeader = "message-key"

// Headers in which a delivery keeps the AMQP properties content_type (unless it is application/protobuf) and
// content_encoding.
const (
	ContentTypeHeader     = "content-type"
	ContentEncodingHeader = "content-encoding"
)

// Message is one fact to publish. New makes it, and outbox.Insert stores it.
type Message struct {
	// ID is a UUIDv7 and the message's only identity: in the outbox row, as AMQP message_id, and as inbox key.
	ID uuid.UUID
	// Type is the protobuf full name of the payload. It is also the routing key and thus decides who receives the message.
	Type string
	// Key defines the order: messages with the same non-empty key are delivered and applied in the order in which their
	// transactions committed. Messages without a key have no order among each other.
	Key string
	// Payload is the protobuf binary encoding of the body.
	Payload []byte
	// Headers travel with the payload: trace context and the sender's own headers. Names consist of lower-case letters,
	// digits and dashes; the prefix x- is reserved for the broker. Headers never become AMQP properties.
	Headers map[string]string
	// CreatedAt is when the row was inserted, by the database's clock. The outbox sets it.
	CreatedAt time.Time

	err error // why New could not encode the body; Validate reports it
}

// New makes a message with the given body. Messages with the same key are ordered; "" means no order.
// Validate, which outbox.Insert calls, reports a body that cannot be encoded.
func New(key string, body proto.Message) Message {
	m := Message{Type: string(body.ProtoReflect().Descriptor().FullName()), Key: key}
	m.Payload, m.err = proto.Marshal(body)
	if m.err == nil {
		m.ID, m.err = uuid.NewV7()
	}
	return m
}

// ErrInvalid is wrapped by every error of Validate. The message itself is invalid, and no retry will fix it.
var ErrInvalid = errors.New("invalid message")

var headerPattern = regexp.MustCompile(`^[a-z0-9][a-z0-9-]{0,63}$`)

// Validate reports why the message cannot be published, as an error that wraps ErrInvalid.
func (m Message) Validate() error {
	switch {
	case m.err != nil:
		return fmt.Errorf("%w: %s: encode body: %w", ErrInvalid, m.Type, m.err)
	case m.ID.Version() != 7:
		return fmt.Errorf("%w: id %s is not a UUIDv7", ErrInvalid, m.ID)
	case len(m.Type) > MaxType || !protoreflect.FullName(m.Type).IsValid():
		return fmt.Errorf("%w: type %.300q is not a protobuf full name of at most %d bytes", ErrInvalid, m.Type,
			MaxType)
	case len(m.Key) > MaxKey || !ValidText(m.Key):
		return fmt.Errorf("%w: key %.300q must be UTF-8 without NUL, at most %d bytes", ErrInvalid, m.Key, MaxKey)
	case len(m.Payload) > MaxPayload:
		return fmt.Errorf("%w: payload has %d bytes, limit %d", ErrInvalid, len(m.Payload), MaxPayload)
	case len(m.Headers) > MaxHeaders:
		return fmt.Errorf("%w: %d headers, limit %d", ErrInvalid, len(m.Headers), MaxHeaders)
	}
	for name, value := range m.Headers {
		if !headerPattern.MatchString(name) || strings.HasPrefix(name, "x-") || name == KeyHeader {
			const want = "use at most 64 characters of a-z, 0-9 and dash, not x-… and not " + KeyHeader
			return fmt.Errorf("%w: header name %.100q: %s", ErrInvalid, name, want)
		}
		if len(value) > MaxHeaderValue || !ValidText(value) {
			const want = "value must be UTF-8 without NUL, at most %d bytes"
			return fmt.Errorf("%w: header %s: "+want, ErrInvalid, name, MaxHeaderValue)
		}
	}
	return nil
}

// NotNil keeps an empty payload, which is a valid protobuf message, from becoming NULL in SQL.
func NotNil(payload []byte) []byte {
	if payload == nil {
		return []byte{}
	}
	return payload
}
