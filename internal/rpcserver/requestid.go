package rpcserver

import (
	"context"
	"crypto/rand"
	"regexp"

	"connectrpc.com/connect/v2"
)

const requestIDHeader = "X-Request-Id"

// saneID keeps out what would look like something else in a log.
var saneID = regexp.MustCompile(`^[A-Za-z0-9._-]{1,64}$`)

// requestID returns the ID that the caller gave, if it is sane, or else a new one.
func requestID(given string) string {
	if saneID.MatchString(given) {
		return given
	}
	return rand.Text()
}

type requestIDKey struct{}

// RequestID returns the ID that the log knows the call by: the caller's x-request-id, or one that was made for it.
func RequestID(ctx context.Context) string {
	id, _ := ctx.Value(requestIDKey{}).(string)
	return id
}

// nameRequest gives each call its ID. Over HTTP, newEdge has put it into the header.
func nameRequest(next connect.ServerFunc) connect.ServerFunc {
	return func(ctx context.Context, spec connect.Spec, stream connect.ServerStream) error {
		info, _ := connect.CallInfoForServerContext(ctx)
		return next(context.WithValue(ctx, requestIDKey{}, requestID(info.RequestHeader().Get(requestIDHeader))), spec, stream)
	}
}
