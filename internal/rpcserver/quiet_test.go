package rpcserver

import (
	"context"
	"log/slog"
	"testing"
	"testing/synctest"
	"time"

	"connectrpc.com/connect/v2"
)

// discard is a stream that discards its messages.
type discard struct{ connect.ServerStream }

func (discard) Send(any) error { return nil }

// A stream ends after it was quiet for too long, and not earlier.
func TestQuietStreamsEnd(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		began := time.Now()
		watch := func(ctx context.Context, _ connect.Spec, stream connect.ServerStream) error {
			for range 5 {
				select {
				case <-time.After(40 * time.Second):
				case <-ctx.Done():
					t.Error("ended although messages were sent")
				}
				_ = stream.Send(nil)
			}
			<-ctx.Done()
			return ctx.Err()
		}
		run := endQuiet(50 * time.Second)(answerErrors(slog.New(slog.DiscardHandler))(watch))
		err := run(t.Context(), connect.Spec{StreamType: connect.StreamTypeServer, Procedure: "/a.B/Watch"}, discard{})
		if took := time.Since(began); connect.CodeOf(err) != connect.CodeUnavailable || took != 250*time.Second {
			t.Errorf("ended after %s with error %v", took, err)
		}
	})
}

// Unary calls, health watches and reflection may be quiet.
func TestOtherCallsMayBeQuiet(t *testing.T) {
	t.Parallel()
	for _, spec := range []connect.Spec{
		{Procedure: "/a.B/Call"}, {StreamType: connect.StreamTypeServer, Procedure: "/grpc.health.v1.Health/Watch"},
		{StreamType: connect.StreamTypeBidi, Procedure: "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"},
	} {
		synctest.Test(t, func(t *testing.T) {
			err := endQuiet(50*time.Second)(func(ctx context.Context, _ connect.Spec, _ connect.ServerStream) error {
				time.Sleep(time.Hour) // on synctest's clock
				return ctx.Err()
			})(t.Context(), spec, discard{})
			if err != nil {
				t.Errorf("%s: %v", spec.Procedure, err)
			}
		})
	}
}
