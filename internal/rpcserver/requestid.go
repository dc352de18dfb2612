package rpcserver

import (
	"context"
	"crypto/rand"
	"regexp"

	"connectrpc.com/connect/v2"
)

const requestIDHeader = "X-Request-Id"

// validID excludes IDs that could forge parts of a log line.
var validID = regexp.MustCompile(`^[A-Za-z0-9._-]{1,64}$`)

// requestID returns the caller's ID if it is valid, or else a new one.
func requestID(given string) string {
	if validID.MatchString(given) {
		return given
	}
	return rand.Text()
}

type requestIDKey struct{}

// RequestID returns the ID of the call in the log: the caller's x-request-id or a generated one.
func RequestID(ctx context.Context) string {
	id, _ := ctx.Value(requestIDKey{}).(string)
	return id
}

// nameRequest sets the ID of each call. Over HTTP, newEdge has put it into the header.
func nameRequest(next connect.ServerFunc) connect.ServerFunc {
	return func(ctx context.Context, spec connect.Spec, stream connect.ServerStream) error {
		info, _ := connect.CallInfoForServerContext(ctx)
		id := requestID(info.RequestHeader().Get(requestIDHeader))
		return next(context.WithValue(ctx, requestIDKey{}, id), spec, stream)
	}
}
