package rpcserver

import (
	"context"
	"log/slog"
	"testing"
	"testing/synctest"
	"time"

	"connectrpc.com/connect/v2"
)

// silent is a stream whose messages go nowhere.
type silent struct{ connect.ServerStream }

func (silent) Send(any) error { return nil }

// A stream ends when it was quiet for too long, and not before.
func TestQuietStreamsEnd(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		began := time.Now()
		watch := func(ctx context.Context, _ connect.Spec, stream connect.ServerStream) error {
			for range 5 {
				select {
				case <-time.After(40 * time.Second):
				case <-ctx.Done():
					t.Error("ended although something was sent")
				}
				_ = stream.Send(nil)
			}
			<-ctx.Done()
			return ctx.Err()
		}
		run := endQuiet(50 * time.Second)(answerErrors(slog.New(slog.DiscardHandler))(watch))
		err := run(t.Context(), connect.Spec{StreamType: connect.StreamTypeServer, Procedure: "/a.B/Watch"}, silent{})
		if took := time.Since(began); connect.CodeOf(err) != connect.CodeUnavailable || took != 250*time.Second {
			t.Errorf("after %s: %v", took, err)
		}
	})
}

// Calls, and watchers of health, may be quiet.
func TestOthersMayBeQuiet(t *testing.T) {
	t.Parallel()
	for _, spec := range []connect.Spec{
		{Procedure: "/a.B/Call"}, {StreamType: connect.StreamTypeServer, Procedure: "/grpc.health.v1.Health/Watch"},
		{StreamType: connect.StreamTypeBidi, Procedure: "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"},
	} {
		synctest.Test(t, func(t *testing.T) {
			err := endQuiet(50*time.Second)(func(ctx context.Context, _ connect.Spec, _ connect.ServerStream) error {
				time.Sleep(time.Hour) // of the bubble's clock
				return ctx.Err()
			})(t.Context(), spec, silent{})
			if err != nil {
				t.Errorf("%s: %v", spec.Procedure, err)
			}
		})
	}
}
