package rabbitrpc

import (
	"errors"
	"slices"
	"strconv"
	"strings"
	"time"

	"connectrpc.com/connect/v2"
	"connectrpc.com/connect/v2/connectproto"
	"example.com/shop/internal/bounds"
	amqp "github.com/rabbitmq/amqp091-go"
	"golang.org/x/net/http/httpguts"
	"google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
)

// Besides its body, a request contains the procedure in the property type, the time left in expiration (for the
// broker), and in headers the deadline (for the server), the metadata and the trace context. A reply's type tells
// whether its body is the answer or a google.rpc.Status; its headers contain metadata and trailers.
const (
	contentType = "application/proto"
	typeAnswer  = "answer"
	typeError   = "error"

	// deadlineHeader is when the caller gives up, by its own clock, in milliseconds since 1970.
	deadlineHeader = "deadline"
	// metadataHeader and trailerHeader each contain a table of lists of strings. Metadata must not be top-level headers: a
	// caller's header named CC would send the request to a second queue.
	metadataHeader = "metadata"
	trailerHeader  = "trailer"
)

const (
	// maxMetadataBytes bounds the encoded metadata of a request or a reply, trailers included. A header frame is limited
	// to the connection's frame size, 128 KiB. A larger one ends the connection with all calls in flight.
	maxMetadataBytes = 64 << 10
	// maxMetadataValues bounds the values of metadata: the client library cannot read a list of more than 8,192 values.
	maxMetadataValues = 1024
	// maxNameBytes bounds the names of headers, procedures and services, which are short strings in AMQP.
	maxNameBytes = 255
	// maxDeadline is the longest time that a request can wait: the broker's timer accepts no more.
	maxDeadline = 24 * 24 * time.Hour
)

var errMetadataTooLarge = connect.Errorf(connect.CodeResourceExhausted,
	"the metadata has more than %d bytes or %d values, or a name of more than %d bytes",
	maxMetadataBytes, maxMetadataValues, maxNameBytes)

// isProtocolHeader reports whether a header belongs to the protocol rather than to its users. HTTP does not send such
// headers for users either.
func isProtocolHeader(name string) bool {
	switch name {
	case "Content-Type", "Content-Length", "Content-Encoding", "Accept-Encoding", "Trailer", "Date":
		return true
	}
	return strings.HasPrefix(name, "Connect-") || strings.HasPrefix(name, "Grpc-")
}

// metadata measures the encoded metadata of one message.
type metadata struct{ bytes, values int }

// add counts a name and its values, and refuses those that HTTP would refuse.
func (m *metadata) add(name string, values []string) error {
	const perName = 1 + 1 + 4 // length of the name; type and length of the list
	const perValue = 1 + 4    // type and length of the value
	m.bytes += perName + len(name)
	if m.values += len(values); len(name) > maxNameBytes || m.values > maxMetadataValues {
		return errMetadataTooLarge
	}
	if !httpguts.ValidHeaderFieldName(name) {
		return connect.Errorf(connect.CodeInvalidArgument, "the metadata name %q is not a valid HTTP header name", name)
	}
	for _, value := range values {
		if m.bytes += perValue + len(value); m.bytes > maxMetadataBytes {
			return errMetadataTooLarge
		}
		if !httpguts.ValidHeaderFieldValue(value) {
			return connect.Errorf(connect.CodeInvalidArgument, "metadata %s has a value with control characters", name)
		}
	}
	return nil
}

// encode adds header to headers under name, unless it is empty.
func (m *metadata) encode(headers amqp.Table, name string, header *connect.Header) error {
	if header.Len() == 0 {
		return nil
	}
	table := amqp.Table{}
	for name, values := range header.All() {
		if isProtocolHeader(name) || len(values) == 0 {
			continue
		}
		if err := m.add(name, values); err != nil {
			return err
		}
		list := make([]any, len(values))
		for i, value := range values {
			list[i] = value
		}
		table[name] = list
	}
	headers[name] = table
	return nil
}

// decode reads what encode wrote. It does not trust the sender.
func (m *metadata) decode(headers amqp.Table, name string, header *connect.Header) error {
	if headers[name] == nil {
		return nil
	}
	table, ok := headers[name].(amqp.Table)
	if !ok {
		return connect.Errorf(connect.CodeInvalidArgument, "header %s is a %T", name, headers[name])
	}
	for name, list := range table {
		values, ok := list.([]any)
		if !ok {
			return connect.Errorf(connect.CodeInvalidArgument, "metadata %q is a %T", name, list)
		}
		texts := make([]string, len(values))
		for i := range values {
			if texts[i], ok = values[i].(string); !ok {
				return connect.Errorf(connect.CodeInvalidArgument, "metadata %q contains a %T", name, values[i])
			}
		}
		if err := m.add(name, texts); err != nil {
			return err
		}
		header.SetValues(name, texts)
	}
	return nil
}

// encodeDeadline writes the request's deadline for the broker and for the server. It rounds a fraction of a
// millisecond up to one millisecond, because to the broker 0 means "deliver only if a consumer is ready".
func encodeDeadline(p *amqp.Publishing, deadline time.Time) {
	now := time.Now()
	left := min(deadline.Sub(now), maxDeadline)
	p.Expiration = strconv.FormatInt(max(1, left.Milliseconds()), 10)
	p.Headers[deadlineHeader] = now.Add(left).UnixMilli()
}

// decodeDeadline returns when the request expires by our clock. However slow our clock is, the request never gets more
// time from now on than the caller had when it sent the request.
func decodeDeadline(d *amqp.Delivery, now time.Time) (time.Time, error) {
	stated, ok := d.Headers[deadlineHeader].(int64)
	if !ok {
		const text = "header %s is a %T, want a long integer"
		return time.Time{}, connect.Errorf(connect.CodeInvalidArgument, text, deadlineHeader, d.Headers[deadlineHeader])
	}
	left, err := strconv.ParseUint(d.Expiration, 10, 64)
	if err != nil && !errors.Is(err, strconv.ErrRange) {
		return time.Time{}, connect.NewError(connect.CodeInvalidArgument, "expiration is not a number of milliseconds")
	}
	latest := now.Add(time.Duration(min(left, uint64(maxDeadline.Milliseconds()))) * time.Millisecond)
	if latest.UnixMilli() < stated {
		return latest, nil
	}
	return time.UnixMilli(stated), nil
}

// encodeError makes the body of an error reply.
func encodeError(err *connect.Error) ([]byte, error) {
	encoded := &status.Status{Code: int32(err.Code()), Message: strings.ToValidUTF8(err.Message(), "�")}
	for _, detail := range err.Details() {
		encoded.Details = append(encoded.Details, connectproto.ErrorDetailToAny(detail))
	}
	return proto.Marshal(encoded)
}

// decodeError decodes the body of an error reply. It marks the error as remote, so that a handler that returns it
// does not present it as its own.
func decodeError(body []byte) *connect.Error {
	var encoded status.Status
	if err := proto.Unmarshal(body, &encoded); err != nil {
		return connect.NewError(connect.CodeInternal, "the answer cannot be decoded").WithCause(err)
	}
	code := connect.Code(encoded.GetCode())
	if code < connect.CodeCanceled || code > connect.CodeUnauthenticated {
		code = connect.CodeUnknown
	}
	err := connect.NewError(code, encoded.GetMessage()).WithRemote()
	for _, detail := range encoded.GetDetails() {
		err = err.WithDetail(detailOf(detail))
	}
	return err
}

func detailOf(detail *anypb.Any) *connect.ErrorDetail {
	name := detail.GetTypeUrl()
	return &connect.ErrorDetail{Type: name[strings.LastIndexByte(name, '/')+1:], Value: slices.Clone(detail.GetValue())}
}

// encodeMessage makes the body of a request or an answer.
func encodeMessage(message any, limit int) ([]byte, error) {
	encoded, ok := message.(proto.Message)
	if !ok {
		return nil, connect.Errorf(connect.CodeInternal, "%T is not a protobuf message", message)
	}
	body, err := proto.Marshal(encoded)
	if err != nil {
		return nil, connect.NewError(connect.CodeInternal, "encode message").WithCause(err)
	}
	if len(body) > limit {
		return nil, tooLarge(len(body), limit)
	}
	return body, nil
}

func decodeMessage(body []byte, message any) error {
	decoded, ok := message.(proto.Message)
	if !ok {
		return connect.Errorf(connect.CodeInternal, "%T is not a protobuf message", message)
	}
	return bounds.Unmarshal(body, decoded)
}

func tooLarge(size, limit int) *connect.Error {
	return connect.Errorf(connect.CodeResourceExhausted, "message size %d is larger than configured max %d", size,
		limit)
}
