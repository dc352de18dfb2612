package rpcserver

import (
	"context"
	"errors"
	"time"

	"connectrpc.com/connect/v2"
)

// errQuiet is why a stream's context ends when nothing was sent for too long.
var errQuiet = errors.New("nothing was sent on the stream for too long")

// endQuiet ends a server's stream on which nothing was sent for so long. What a proxy in between would do a little later looks to the client like
// a fault of the server; this is an answer, and the client opens the stream again as it does when a server shuts down. The protocols have no
// message that says nothing, and HTTP/2's pings end at the proxy. Health checks are left out: their clients take the end for bad news.
func endQuiet(after time.Duration) connect.ServerInterceptor {
	return func(next connect.ServerFunc) connect.ServerFunc {
		return func(ctx context.Context, spec connect.Spec, stream connect.ServerStream) error {
			if spec.StreamType != connect.StreamTypeServer || isInfrastructure(spec.Procedure) {
				return next(ctx, spec, stream)
			}
			ctx, cancel := context.WithCancelCause(ctx)
			defer cancel(nil)
			timer := time.AfterFunc(after, func() { cancel(errQuiet) })
			defer timer.Stop()
			return next(ctx, spec, heard{stream, timer, after})
		}
	}
}

// heard is a stream whose messages put its end off.
type heard struct {
	connect.ServerStream
	timer *time.Timer
	after time.Duration
}

func (h heard) Send(message any) error {
	h.timer.Reset(h.after)
	return h.ServerStream.Send(message)
}
