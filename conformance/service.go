package main

import (
	"context"
	"errors"
	"io"
	"time"

	"connectrpc.com/connect/v2"
	"connectrpc.com/connect/v2/connecthttp"
	"connectrpc.com/connect/v2/connectproto"
	conformancev1 "example.com/shop/conformance/gen/connectrpc/conformance/v1"
	"example.com/shop/conformance/gen/connectrpc/conformance/v1/conformancev1connect"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
)

// service answers each request as the request specifies, see the comments of the suite's service.proto. It does not
// implement the procedure Unimplemented.
type service struct {
	conformancev1connect.UnimplementedConformanceServiceHandler
}

func register(server *connect.Server) {
	conformancev1connect.RegisterConformanceServiceHandler(server, service{})
}

func (service) Unary(ctx context.Context, req *conformancev1.UnaryRequest) (*conformancev1.UnaryResponse, error) {
	payload, err := answer(ctx, req.GetResponseDefinition(), req)
	return &conformancev1.UnaryResponse{Payload: payload}, err
}

func (service) IdempotentUnary(
	ctx context.Context, req *conformancev1.IdempotentUnaryRequest,
) (*conformancev1.IdempotentUnaryResponse, error) {
	payload, err := answer(ctx, req.GetResponseDefinition(), req)
	return &conformancev1.IdempotentUnaryResponse{Payload: payload}, err
}

func (service) ClientStream(
	ctx context.Context, stream conformancev1connect.ConformanceServiceClientStreamServerStream,
) (*conformancev1.ClientStreamResponse, error) {
	var received []proto.Message
	var definition *conformancev1.UnaryResponseDefinition
	for {
		req, err := stream.Receive()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, err
		}
		if len(received) == 0 {
			definition = req.GetResponseDefinition()
		}
		received = append(received, req)
	}
	payload, err := answer(ctx, definition, received...)
	return &conformancev1.ClientStreamResponse{Payload: payload}, err
}

// answer returns the single answer to the received messages.
func answer(
	ctx context.Context, definition *conformancev1.UnaryResponseDefinition, received ...proto.Message,
) (*conformancev1.ConformancePayload, error) {
	info, err := requestInfo(ctx, received...)
	if err != nil {
		return nil, err
	}
	setMetadata(ctx, definition)
	if err := pause(ctx, definition.GetResponseDelayMs()); err != nil {
		return nil, err
	}
	if failure := definition.GetError(); failure != nil {
		return nil, newError(failure, info)
	}
	return &conformancev1.ConformancePayload{Data: definition.GetResponseData(), RequestInfo: info}, nil
}

func (service) ServerStream(
	ctx context.Context, req *conformancev1.ServerStreamRequest,
	stream conformancev1connect.ConformanceServiceServerStreamServerStream,
) error {
	out := responses{definition: req.GetResponseDefinition()}
	out.send = func(payload *conformancev1.ConformancePayload) error {
		return stream.Send(&conformancev1.ServerStreamResponse{Payload: payload})
	}
	setMetadata(ctx, out.definition)
	if len(out.definition.GetResponseData()) > 0 {
		if err := stream.SendHeaders(); err != nil {
			return err
		}
	}
	return out.rest(ctx, req)
}

func (service) BidiStream(
	ctx context.Context, stream conformancev1connect.ConformanceServiceBidiStreamServerStream,
) error {
	out := responses{send: func(payload *conformancev1.ConformancePayload) error {
		return stream.Send(&conformancev1.BidiStreamResponse{Payload: payload})
	}}
	var received []proto.Message
	duplex := false
	for first := true; ; first = false {
		req, err := stream.Receive()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
		received = append(received, req)
		if first {
			out.definition, duplex = req.GetResponseDefinition(), req.GetFullDuplex()
			setMetadata(ctx, out.definition)
		}
		if !duplex {
			continue
		}
		if out.sent == len(out.definition.GetResponseData()) {
			return out.rest(ctx, received...)
		}
		if first {
			if err := stream.SendHeaders(); err != nil {
				return err
			}
		}
		if err := out.next(ctx, received...); err != nil {
			return err
		}
		received = nil
	}
	if !duplex && len(out.definition.GetResponseData()) > 0 {
		if err := stream.SendHeaders(); err != nil {
			return err
		}
	}
	return out.rest(ctx, received...)
}

// responses sends the responses of a stream.
type responses struct {
	definition *conformancev1.StreamResponseDefinition
	send       func(*conformancev1.ConformancePayload) error
	sent       int
}

// next sends the next response after its delay. The first response describes the request, and later ones contain the
// messages received since the previous one.
func (r *responses) next(ctx context.Context, received ...proto.Message) error {
	payload := &conformancev1.ConformancePayload{Data: r.definition.GetResponseData()[r.sent]}
	var err error
	switch {
	case r.sent == 0:
		payload.RequestInfo, err = requestInfo(ctx, received...)
	case len(received) > 0:
		payload.RequestInfo = new(conformancev1.ConformancePayload_RequestInfo)
		payload.RequestInfo.Requests, err = packed(received)
	}
	if err != nil {
		return err
	}
	if err := pause(ctx, r.definition.GetResponseDelayMs()); err != nil {
		return err
	}
	r.sent++
	return r.send(payload)
}

// rest sends the remaining responses, and returns the error that ends the stream.
func (r *responses) rest(ctx context.Context, received ...proto.Message) error {
	for r.sent < len(r.definition.GetResponseData()) {
		if err := r.next(ctx, received...); err != nil {
			return err
		}
		received = nil
	}
	failure := r.definition.GetError()
	if failure == nil {
		return nil
	}
	if r.sent > 0 {
		return newError(failure, nil)
	}
	asked, err := requestInfo(ctx, received...)
	if err != nil {
		return err
	}
	return newError(failure, asked)
}

// pause waits for a response's delay, unless the call ends before.
func pause(ctx context.Context, milliseconds uint32) error {
	select {
	case <-time.After(time.Duration(milliseconds) * time.Millisecond):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// setMetadata sets the headers and trailers that a definition asks for.
func setMetadata(ctx context.Context, definition interface {
	GetResponseHeaders() []*conformancev1.Header
	GetResponseTrailers() []*conformancev1.Header
}) {
	info, _ := connect.CallInfoForServerContext(ctx)
	for _, header := range definition.GetResponseHeaders() {
		info.ResponseHeader().SetValues(header.GetName(), header.GetValue())
	}
	for _, trailer := range definition.GetResponseTrailers() {
		info.ResponseTrailer().SetValues(trailer.GetName(), trailer.GetValue())
	}
}

// noTimeout is the timeout of calls whose caller has set none over transports where every call has one.
// It is longer than any timeout of the suite.
const noTimeout = time.Hour

// requestInfo describes a call as the server received it.
func requestInfo(
	ctx context.Context, received ...proto.Message,
) (*conformancev1.ConformancePayload_RequestInfo, error) {
	call, _ := connect.CallInfoForServerContext(ctx)
	info := new(conformancev1.ConformancePayload_RequestInfo)
	for name, values := range call.RequestHeader().All() {
		info.RequestHeaders = append(info.RequestHeaders, &conformancev1.Header{Name: name, Value: values})
	}
	if deadline, ok := ctx.Deadline(); ok && time.Until(deadline) < noTimeout/2 {
		info.TimeoutMs = proto.Int64(time.Until(deadline).Milliseconds())
	}
	if web, ok := connecthttp.ServerInfoForContext(ctx); ok && len(web.HTTPGetQueryParams()) > 0 {
		info.ConnectGetInfo = new(conformancev1.ConformancePayload_ConnectGetInfo)
		for name, values := range web.HTTPGetQueryParams() {
			param := &conformancev1.Header{Name: name, Value: values}
			info.ConnectGetInfo.QueryParams = append(info.ConnectGetInfo.QueryParams, param)
		}
	}
	var err error
	info.Requests, err = packed(received)
	return info, err
}

func packed(messages []proto.Message) (all []*anypb.Any, err error) {
	for _, message := range messages {
		packed, err := anypb.New(message)
		if err != nil {
			return nil, err
		}
		all = append(all, packed)
	}
	return all, nil
}

// newError returns the error that the request specifies. A non-nil info becomes a further detail.
func newError(specified *conformancev1.Error, info *conformancev1.ConformancePayload_RequestInfo) error {
	result := connect.NewError(connect.Code(specified.GetCode()), specified.GetMessage())
	details := specified.GetDetails()
	if info != nil {
		detail, err := anypb.New(info)
		if err != nil {
			return err
		}
		details = append(details, detail)
	}
	for _, message := range details {
		detail, err := connectproto.NewErrorDetail(message)
		if err != nil {
			return err
		}
		result = result.WithDetail(detail)
	}
	return result
}
