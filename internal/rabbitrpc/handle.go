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

// handle judges a request, executes it if it is to be executed, and returns the reply: nil for a message that nobody can
// be answered for.
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
		spec.Procedure = "/" + service.name + "/unknown" // for the meters: names of a caller's choice would have no end
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

// unanswerable says why a request cannot be answered, or must not be.
func unanswerable(d *amqp.Delivery) string {
	switch {
	case d.ReplyTo == "":
		return "no_reply_to"
	case !strings.HasPrefix(d.ReplyTo, addressPrefix):
		// Anything else is the name of a queue, and an answer to it a message of the caller's making, sent with our permissions.
		return "foreign_reply_to"
	}
	return ""
}

// read takes in what a request says of itself.
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

// refuse returns why a request must not be executed, nil if it must.
func (s *session) refuse(d *amqp.Delivery, spec connect.Spec, known bool, now, deadline time.Time) error {
	switch {
	case !known:
		return connect.Errorf(connect.CodeUnimplemented, "%s has no such method", strings.TrimPrefix(spec.Procedure, "/"))
	case spec.StreamType != connect.StreamTypeUnary:
		return connect.NewError(connect.CodeUnimplemented, "streams are not served over RabbitMQ")
	case d.ContentType != contentType:
		return connect.Errorf(connect.CodeUnimplemented, "content type is not %s", contentType)
	case len(d.Body) > s.config.RequestMaxBytes:
		return tooLarge(len(d.Body), s.config.RequestMaxBytes)
	case !now.Before(deadline):
		return connect.NewError(connect.CodeDeadlineExceeded, "the request came too late and was not executed")
	case d.Redelivered && spec.IdempotencyLevel == connect.IdempotencyUnknown:
		// Another replica had it, and is gone without an answer. Nobody knows how far it came.
		return connect.NewError(connect.CodeUnavailable, "a server was lost; outcome unknown, and not tried again: the method is not declared idempotent")
	}
	return nil
}

var errPanicked = connect.NewError(connect.CodeInternal, "internal error")

// execute calls the method through the interceptors.
func (s *session) execute(ctx context.Context, deadline time.Time, spec connect.Spec, stream *serverStream) (err error) {
	ctx, cancel := context.WithDeadline(ctx, deadline)
	defer cancel()
	defer func() {
		if p := recover(); p != nil {
			s.config.Log.ErrorContext(ctx, "rpc panicked", "procedure", spec.Procedure, "panic", fmt.Sprint(p), "stack", string(debug.Stack()))
			err = errPanicked
		}
	}()
	info := stream.info
	info.Spec, info.Protocol, info.Codec = spec, Protocol, connect.CodecNameProto
	info.RequestEncoding, info.ResponseEncoding = connect.CompressionNameIdentity, connect.CompressionNameIdentity
	info.ReceiveStats = connect.MessageStats{Size: len(stream.request)}
	return s.rpc.Call(ctx, spec.Procedure, info, stream)
}

// serverStream is a request and the reply to it, seen as a connect.ServerStream.
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

var errSecondAnswer = errors.New("a unary call has one answer")

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

// reply makes the reply to a call that ended with err, and returns the error that it tells of.
func (s *serverStream) reply(err error) (*amqp.Publishing, error) {
	if err == nil && !s.sent {
		err = connect.NewError(connect.CodeUnimplemented, "unary stream has no message")
	}
	headers, size := amqp.Table{}, new(metadata)
	unfit := size.encode(headers, metadataHeader, s.info.ResponseHeader())
	if unfit == nil {
		unfit = size.encode(headers, trailerHeader, s.info.ResponseTrailer())
	}
	if unfit != nil {
		headers = amqp.Table{}
		if err = unfit; !errors.Is(unfit, errMetadataTooLarge) { // the handler's fault, not the caller's
			err = connect.NewError(connect.CodeInternal, "internal error").WithCause(unfit)
		}
	}
	reply := &amqp.Publishing{Type: typeAnswer, ContentType: contentType, Headers: headers, Body: s.answer}
	if err != nil {
		told := bounds.Error(public(err))
		if reply.Body, err = encodeError(told); err != nil || len(reply.Body) > s.limit {
			told = connect.NewError(told.Code(), "the error is too large to be sent")
			reply.Body, _ = encodeError(told)
		}
		reply.Type = typeError
		return reply, told
	}
	return reply, nil
}

// public is what a caller may see of a handler's error, by Connect's rules: an error made to be seen, and of others a code at most.
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
