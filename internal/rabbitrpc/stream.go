package rabbitrpc

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"io"
	"sync"

	"connectrpc.com/connect/v2"
	"example.com/shop/internal/rabbit"
	amqp "github.com/rabbitmq/amqp091-go"
	"go.opentelemetry.io/otel/trace"
)

// stream presents a unary call as a connect.ClientStream: one Send, one Receive.
type stream struct {
	transport *Transport
	spec      connect.Spec
	ctx       context.Context // the call's context, with its deadline
	cancel    context.CancelFunc
	info      *connect.CallInfo
	observed  *observation
	ended     sync.Once

	sent     chan struct{} // closed by Send
	link     *link         // set by Send, as is call
	call     *call
	received bool
}

func (t *Transport) newStream(ctx context.Context, spec connect.Spec) *stream {
	info, ok := connect.CallInfoForClientContext(ctx)
	if !ok {
		info = new(connect.CallInfo)
	}
	info.Spec, info.Protocol, info.Codec = spec, Protocol, connect.CodecNameProto
	info.RequestEncoding, info.ResponseEncoding = connect.CompressionNameIdentity, connect.CompressionNameIdentity
	ctx, observed := observe(ctx, &t.meters, t.tracer, trace.SpanKindClient, spec.Procedure)
	s := &stream{transport: t, spec: spec, info: info, observed: observed, sent: make(chan struct{})}
	if _, has := ctx.Deadline(); has {
		s.ctx, s.cancel = context.WithCancel(ctx)
	} else {
		s.ctx, s.cancel = context.WithTimeout(ctx, t.config.Timeout)
	}
	return s
}

// SendHeaders implements connect.ClientStream. Headers travel with the message.
func (s *stream) SendHeaders() error { return nil }

// CloseSend implements connect.ClientStream.
func (s *stream) CloseSend() error { return nil }

var errSecondMessage = errors.New("a unary call has only one request")

// Send implements connect.ClientStream.
func (s *stream) Send(message any) error {
	if s.call != nil {
		return errSecondMessage
	}
	err := s.send(message)
	if err != nil {
		s.end(err)
		return err
	}
	close(s.sent)
	return nil
}

func (s *stream) send(message any) error {
	config := &s.transport.config
	body, err := encodeMessage(message, config.RequestMaxBytes)
	if err != nil {
		return err
	}
	if len(s.spec.Procedure) > maxNameBytes {
		return connect.Errorf(connect.CodeUnimplemented, "the procedure name has more than %d bytes", maxNameBytes)
	}
	s.info.SendStats = connect.MessageStats{Size: len(body)}
	if s.link, err = s.transport.connected(s.ctx); err != nil {
		return err
	}
	headers := amqp.Table{}
	if err := new(metadata).encode(headers, metadataHeader, s.info.RequestHeader()); err != nil {
		return err
	}
	traceContext.Inject(s.ctx, carrier(headers))
	deadline, _ := s.ctx.Deadline()
	c := &call{id: newID(), ctx: s.ctx, routingKey: ServiceOf(s.spec.Procedure), outcome: make(chan outcome, 1)}
	c.publishing = amqp.Publishing{
		Type: s.spec.Procedure, CorrelationId: c.id, ReplyTo: directReply, ContentType: contentType,
		Headers: headers, Body: body,
	}
	encodeDeadline(&c.publishing, deadline)
	s.call = c
	return s.link.send(c)
}

// newID makes a correlation ID that cannot be guessed.
func newID() string {
	var id [16]byte
	_, _ = rand.Read(id[:]) // never fails
	return hex.EncodeToString(id[:])
}

// Receive implements connect.ClientStream.
func (s *stream) Receive(message any) error {
	if s.received {
		return io.EOF
	}
	s.received = true
	err := s.receive(message)
	s.end(err)
	return err
}

func (s *stream) receive(message any) error {
	select {
	case <-s.sent:
	case <-s.ctx.Done():
		return fromContext(s.ctx)
	}
	select {
	case outcome := <-s.call.outcome:
		if outcome.err != nil {
			return outcome.err
		}
		return s.read(outcome.reply, message)
	case <-s.ctx.Done():
		s.link.take(s.call.id)
		return fromContext(s.ctx)
	}
}

func (s *stream) read(reply *amqp.Delivery, message any) error {
	if limit := s.transport.config.ReplyMaxBytes; len(reply.Body) > limit {
		return tooLarge(len(reply.Body), limit)
	}
	s.info.ReceiveStats = connect.MessageStats{Size: len(reply.Body)}
	size := new(metadata)
	err := size.decode(reply.Headers, metadataHeader, s.info.ResponseHeader())
	if err == nil {
		err = size.decode(reply.Headers, trailerHeader, s.info.ResponseTrailer())
	}
	if reason := rabbit.Unreadable(reply.Headers); reason != "" {
		err = errors.New(reason)
	}
	if err == nil {
		switch reply.Type {
		case typeAnswer:
			err = decodeMessage(reply.Body, message)
		case typeError:
			return decodeError(reply.Body)
		default:
			err = errors.New("unknown type")
		}
	}
	if err != nil {
		return connect.NewError(connect.CodeInternal, "the answer cannot be decoded").WithCause(err)
	}
	return nil
}

// Close implements connect.ClientStream.
func (s *stream) Close() error {
	s.cancel()
	s.end(fromContext(s.ctx)) // no effect if the call has already ended
	return nil
}

// end ends the call. The first result is the one that counts in traces and metrics.
func (s *stream) end(err error) {
	s.ended.Do(func() {
		s.observed.end(context.WithoutCancel(s.ctx), err)
		if s.call != nil {
			s.link.take(s.call.id) // the call is still pending if nobody waited for it
		}
		s.cancel()
	})
}
