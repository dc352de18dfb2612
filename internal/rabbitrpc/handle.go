package rabbitrpc

import (
	"context"
	"errors"
	"fmt"
	"io"
	"runtime/debug"
	"strings"
	"time"

	"connectrpc.com/connect/v2"
	"example.com/shop/internal/bounds"
	"example.com/shop/internal/rabbit"
	amqp "github.com/rabbitmq/amqp091-go"
	"go.opentelemetry.io/otel/trace"
)

// handle checks a request, executes it unless it is refused, and returns the reply, or nil if the request cannot be
// answered.
func (s *session) handle(ctx context.Context, service *service, d *amqp.Delivery) *amqp.Publishing {
	if reason := unanswerable(d); reason != "" {
		s.meters.drop(ctx, reason)
		s.config.Log.DebugContext(ctx, "rpc request dropped", "service", service.name, "reason", reason)
		return nil
	}
	now := time.Now()
	stream := &serverStream{request: d.Body, limit: s.config.ReplyMaxBytes, info: new(connect.CallInfo)}
	spec, known := service.methods[d.Type]
	if !known {
		// Caller-supplied names would make the metrics grow without bound.
		spec.Procedure = "/" + service.name + "/unknown"
	}
	deadline, err := read(d, stream.info, now)
	ctx = traceContext.Extract(ctx, carrier(d.Headers))
	ctx, observed := observe(ctx, &s.meters, s.tracer, trace.SpanKindServer, spec.Procedure)
	if err == nil {
		err = s.refuse(d, spec, known, now, deadline)
	}
	if err == nil {
		err = s.execute(ctx, deadline, spec, stream)
	}
	reply, err := stream.reply(err)
	observed.end(context.WithoutCancel(ctx), err)
	reply.CorrelationId = d.CorrelationId
	return reply
}

// unanswerable returns why a request cannot or must not be answered, or "".
func unanswerable(d *amqp.Delivery) string {
	switch {
	case d.ReplyTo == "":
		return "no_reply_to"
	case !strings.HasPrefix(d.ReplyTo, addressPrefix):
		// Any other address names a queue. A reply to it would be a message crafted by the caller and sent with our
		// permissions.
		return "foreign_reply_to"
	}
	return ""
}

// read reads the deadline and the metadata of a request.
func read(d *amqp.Delivery, info *connect.CallInfo, now time.Time) (deadline time.Time, err error) {
	if reason := rabbit.Unreadable(d.Headers); reason != "" {
		return time.Time{}, connect.NewError(connect.CodeInvalidArgument, "the headers cannot be read: "+reason)
	}
	if d.CorrelationId == "" {
		return time.Time{}, connect.NewError(connect.CodeInvalidArgument, "the request has no correlation_id")
	}
	if deadline, err = decodeDeadline(d, now); err == nil {
		err = new(metadata).decode(d.Headers, metadataHeader, info.RequestHeader())
	}
	return deadline, err
}

// refuse returns why a request must not be executed, or nil if it may be.
func (s *session) refuse(d *amqp.Delivery, spec connect.Spec, known bool, now, deadline time.Time) error {
	switch {
	case !known:
		return connect.Errorf(connect.CodeUnimplemented, "%s has no such method", ServiceOf(spec.Procedure))
	case spec.StreamType != connect.StreamTypeUnary:
		return connect.NewError(connect.CodeUnimplemented, "streams are not supported over RabbitMQ")
	case d.ContentType != contentType:
		return connect.Errorf(connect.CodeUnimplemented, "content type is not %s", contentType)
	case len(d.Body) > s.config.RequestMaxBytes:
		return tooLarge(len(d.Body), s.config.RequestMaxBytes)
	case !now.Before(deadline):
		return connect.NewError(connect.CodeDeadlineExceeded,
			"the request arrived after its deadline and was not executed")
	case d.Redelivered && spec.IdempotencyLevel == connect.IdempotencyUnknown:
		// Another replica had the request and was lost without an answer. It is unknown how far the execution got.
		const text = "a server was lost; outcome unknown and not retried: the method is not declared idempotent"
		return connect.NewError(connect.CodeUnavailable, text)
	}
	return nil
}

var errPanicked = connect.NewError(connect.CodeInternal, "internal error")

// execute calls the method through the interceptors.
func (s *session) execute(
	ctx context.Context, deadline time.Time, spec connect.Spec, stream *serverStream,
) (err error) {
	ctx, cancel := context.WithDeadline(ctx, deadline)
	defer cancel()
	defer func() {
		if p := recover(); p != nil {
			s.config.Log.ErrorContext(ctx, "rpc panicked",
				"procedure", spec.Procedure, "panic", fmt.Sprint(p), "stack", string(debug.Stack()))
			err = errPanicked
		}
	}()
	info := stream.info
	info.Spec, info.Protocol, info.Codec = spec, Protocol, connect.CodecNameProto
	info.RequestEncoding, info.ResponseEncoding = connect.CompressionNameIdentity, connect.CompressionNameIdentity
	info.ReceiveStats = connect.MessageStats{Size: len(stream.request)}
	return s.rpc.Call(ctx, spec.Procedure, info, stream)
}

// serverStream presents a request and its reply as a connect.ServerStream.
type serverStream struct {
	info     *connect.CallInfo
	limit    int
	request  []byte
	received bool
	answer   []byte
	sent     bool
}

// Receive implements connect.ServerStream.
func (s *serverStream) Receive(message any) error {
	if s.received {
		return io.EOF
	}
	s.received = true
	if err := decodeMessage(s.request, message); err != nil {
		return connect.Errorf(connect.CodeInvalidArgument, "unmarshal message: %v", err).WithCause(err)
	}
	return nil
}

// SendHeaders implements connect.ServerStream. Headers travel with the answer.
func (s *serverStream) SendHeaders() error { return nil }

var errSecondAnswer = errors.New("a unary call has only one answer")

// Send implements connect.ServerStream.
func (s *serverStream) Send(message any) (err error) {
	if s.sent {
		return errSecondAnswer
	}
	s.sent = true
	s.answer, err = encodeMessage(message, s.limit)
	s.info.SendStats = connect.MessageStats{Size: len(s.answer)}
	return err
}

// reply makes the reply to a call that ended with err. It also returns the error that the reply contains, if any.
func (s *serverStream) reply(err error) (*amqp.Publishing, error) {
	if err == nil && !s.sent {
		err = connect.NewError(connect.CodeUnimplemented, "unary stream has no message")
	}
	headers, size := amqp.Table{}, new(metadata)
	encodeErr := size.encode(headers, metadataHeader, s.info.ResponseHeader())
	if encodeErr == nil {
		encodeErr = size.encode(headers, trailerHeader, s.info.ResponseTrailer())
	}
	if encodeErr != nil {
		headers = amqp.Table{}
		if err = encodeErr; !errors.Is(encodeErr, errMetadataTooLarge) { // the handler's fault, not the caller's
			err = connect.NewError(connect.CodeInternal, "internal error").WithCause(encodeErr)
		}
	}
	reply := &amqp.Publishing{Type: typeAnswer, ContentType: contentType, Headers: headers, Body: s.answer}
	if err != nil {
		sent := bounds.Error(public(err))
		if reply.Body, err = encodeError(sent); err != nil || len(reply.Body) > s.limit {
			sent = connect.NewError(sent.Code(), "the error is too large to send")
			reply.Body, _ = encodeError(sent)
		}
		reply.Type = typeError
		return reply, sent
	}
	return reply, nil
}

// public returns the error that callers may see, by Connect's rules: a *connect.Error of this server as it is, and of
// any other error at most a code.
func public(err error) *connect.Error {
	var own *connect.Error
	switch {
	case errors.As(err, &own) && !own.IsRemote():
		return own
	case own != nil:
		return connect.NewError(connect.CodeInternal, "")
	case errors.Is(err, context.Canceled):
		return connect.NewError(connect.CodeCanceled, "")
	case errors.Is(err, context.DeadlineExceeded):
		return connect.NewError(connect.CodeDeadlineExceeded, "")
	}
	return connect.NewError(connect.CodeUnknown, "")
}
