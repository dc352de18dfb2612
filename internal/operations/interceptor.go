package operations

import (
	"context"
	"strings"

	"connectrpc.com/connect/v2"
	"example.com/shop/internal/unary"
	"github.com/jackc/pgx/v5"
)

const (
	// preferHeader with respondAsync requests a durable call (RFC 7240, section 4.1). appliedHeader confirms it.
	preferHeader  = "Prefer"
	appliedHeader = "Preference-Applied"
	respondAsync  = "respond-async"
	// keyHeader identifies repeated calls.
	keyHeader = "Idempotency-Key"
	// nameHeader has the operation's name in the response.
	nameHeader = "Operation"
)

// Headers returns the headers that Interceptor reads from requests and writes to responses.
func Headers() (request, response []string) {
	return []string{preferHeader, keyHeader}, []string{appliedHeader, nameHeader}
}

// Interceptor returns the interceptor that submits a call with the header Prefer: respond-async instead of executing
// it. The response is an empty message. Its header Operation is the operation's name. The interceptor must follow
// those that identify the caller and validate requests, so that calls they refuse are never submitted.
func (o *Operations) Interceptor() connect.ServerInterceptor {
	return func(next connect.ServerFunc) connect.ServerFunc {
		return func(ctx context.Context, spec connect.Spec, stream connect.ServerStream) error {
			info, ok := connect.CallInfoForServerContext(ctx)
			if !ok || !prefersAsync(info.RequestHeader()) {
				return next(ctx, spec, stream)
			}
			return o.answer(ctx, spec, info, stream)
		}
	}
}

// prefersAsync reports whether respond-async is among the preferences. It ignores parameters.
func prefersAsync(header *connect.Header) bool {
	for _, line := range header.Values(preferHeader) {
		for preference := range strings.SplitSeq(line, ",") {
			name, _, _ := strings.Cut(preference, ";")
			if strings.EqualFold(strings.TrimSpace(name), respondAsync) {
				return true
			}
		}
	}
	return false
}

func (o *Operations) answer(
	ctx context.Context, spec connect.Spec, info *connect.CallInfo, stream connect.ServerStream,
) error {
	method, _ := unary.Describe(spec)
	if method == nil {
		return connect.Errorf(connect.CodeFailedPrecondition,
			"%s cannot be executed later: it has no proto file", spec.Procedure)
	}
	call := Call{
		Procedure: spec.Procedure, Request: unary.New(method.Input()), Key: info.RequestHeader().Get(keyHeader),
	}
	if err := submittable(call); err != nil {
		return err
	}
	if err := stream.Receive(call.Request); err != nil {
		return err
	}
	var name string
	repeat := func(tx pgx.Tx) (found bool, err error) {
		name, found, err = o.Submitted(ctx, tx, call)
		return found, err
	}
	err := o.out.TransactOnce(ctx, repeat, func(tx pgx.Tx) (err error) {
		name, err = o.Submit(ctx, tx, call)
		return err
	})
	if err != nil {
		return err
	}
	info.ResponseHeader().Set(nameHeader, name)
	info.ResponseHeader().Set(appliedHeader, respondAsync)
	return stream.Send(unary.New(method.Output()))
}
