// Package messaging holds the nouns that every other part shares: a Message on its way out, a Delivery on its way in,
// what a Publisher promises, and how a handler says that trying again is useless. It does no I/O.
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

// Limits of one message. They are checked before the row is written, by the view outbox_message for writers in
// other languages, and once more by the relay: what the broker would refuse must never enter the log.
const (
	// MaxPayload is the largest payload in bytes. RabbitMQ's own limit is 16 MiB by default since 4.0 (128 MiB before);
	// a message is meant to be a fact, not a file.
	MaxPayload = 1 << 20
	// MaxType is the longest message type in bytes: AMQP carries it as routing key, a short string of 255 bytes.
	MaxType = 255
	// MaxKey is the longest key in bytes.
	MaxKey = 255
	// MaxHeaders is the most headers that one message may carry.
	MaxHeaders = 32
	// MaxHeaderValue is the longest header value in bytes.
	MaxHeaderValue = 1024
)

// KeyHeader is the header in which the key travels; a message's own headers may not use its name.
const KeyHeader = "message-key"

// Headers in which a delivery keeps the AMQP properties content_type, unless it is application/protobuf, and
// content_encoding.
const (
	ContentTypeHeader     = "content-type"
	ContentEncodingHeader = "content-encoding"
)

// Message is one fact to be published. Make one with New; the outbox carries it from there.
type Message struct {
	// ID is a UUIDv7 and the one identity a message has: outbox row, AMQP message_id, inbox key.
	ID uuid.UUID
	// Type is the protobuf full name of the payload and, as routing key, decides who receives it.
	Type string
	// Key orders: messages with the same non-empty key are delivered and applied in the order in which their
	// transactions committed. Messages without a key have no order among each other.
	Key string
	// Payload is the protobuf binary encoding of the body.
	Payload []byte
	// Headers travel beside the payload: trace context and the sender's own. Names are lower-case letters, digits and
	// dashes; x-… is the broker's. They never become AMQP properties.
	Headers map[string]string
	// CreatedAt is when the row was inserted, by the database's clock. The outbox fills it in.
	CreatedAt time.Time

	err error // why New could not encode the body; Validate reports it
}

// New makes a message of a body. The key orders it among the messages of the same key; "" means no order.
// A body that cannot be encoded is reported by Validate, which outbox.Insert calls.
func New(key string, body proto.Message) Message {
	m := Message{Type: string(body.ProtoReflect().Descriptor().FullName()), Key: key}
	m.Payload, m.err = proto.Marshal(body)
	if m.err == nil {
		m.ID, m.err = uuid.NewV7()
	}
	return m
}

// ErrInvalid is wrapped by every error of Validate: the message itself is wrong and no retry will mend it.
var ErrInvalid = errors.New("invalid message")

var headerPattern = regexp.MustCompile(`^[a-z0-9][a-z0-9-]{0,63}$`)

// Validate reports what would keep the message from being published, as an error that wraps ErrInvalid.
func (m Message) Validate() error {
	switch {
	case m.err != nil:
		return fmt.Errorf("%w: %s: encode body: %w", ErrInvalid, m.Type, m.err)
	case m.ID.Version() != 7:
		return fmt.Errorf("%w: id %s is not a UUIDv7", ErrInvalid, m.ID)
	case len(m.Type) > MaxType || !protoreflect.FullName(m.Type).IsValid():
		return fmt.Errorf("%w: type %.300q is not a protobuf full name of at most %d bytes", ErrInvalid, m.Type, MaxType)
	case len(m.Key) > MaxKey || !ValidText(m.Key):
		return fmt.Errorf("%w: key %.300q must be UTF-8 without NUL, at most %d bytes", ErrInvalid, m.Key, MaxKey)
	case len(m.Payload) > MaxPayload:
		return fmt.Errorf("%w: payload has %d bytes, limit %d", ErrInvalid, len(m.Payload), MaxPayload)
	case len(m.Headers) > MaxHeaders:
		return fmt.Errorf("%w: %d headers, limit %d", ErrInvalid, len(m.Headers), MaxHeaders)
	}
	for name, value := range m.Headers {
		if !headerPattern.MatchString(name) || strings.HasPrefix(name, "x-") || name == KeyHeader {
			return fmt.Errorf("%w: header name %.100q: use a-z, 0-9 and dash, at most 64, not x-… and not %s", ErrInvalid, name, KeyHeader)
		}
		if len(value) > MaxHeaderValue || !ValidText(value) {
			return fmt.Errorf("%w: header %s: value must be UTF-8 without NUL, at most %d bytes", ErrInvalid, name, MaxHeaderValue)
		}
	}
	return nil
}

// NotNil keeps a payload of no bytes, which is a valid protobuf message, from becoming NULL in SQL.
func NotNil(payload []byte) []byte {
	if payload == nil {
		return []byte{}
	}
	return payload
}
