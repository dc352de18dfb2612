package rpcserver

import (
	"context"
	"errors"
	"time"

	"connectrpc.com/connect/v2"
)

// errQuiet is the cause that cancels a stream's context if nothing was sent for too long.
var errQuiet = errors.New("nothing was sent on the stream for too long")

// endQuiet ends a server stream on which nothing was sent for that long. A proxy would cut the stream off a little
// later, and the client would see a server fault. The answer of endQuiet makes the client open the stream again, as
// after a shutdown. The protocols have no empty message to keep the stream alive, and HTTP/2's pings end at the
// proxy. Health checks are exempt, because their clients treat the end as a failure.
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
			return next(ctx, spec, timedStream{stream, timer, after})
		}
	}
}

// timedStream resets its timer with each message that it sends.
type timedStream struct {
	connect.ServerStream
	timer *time.Timer
	after time.Duration
}

func (s timedStream) Send(message any) error {
	s.timer.Reset(s.after)
	return s.ServerStream.Send(message)
}
