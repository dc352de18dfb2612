//go:build unix

package main

import (
	"io"
	"testing"

	"connectrpc.com/connect/v2"
)

func TestCallsWithoutAnAnswerAreRepeated(t *testing.T) {
	t.Parallel()
	for _, one := range []struct {
		err  error
		want bool
	}{
		{connect.Errorf(connect.CodeUnavailable, "away"), true},
		{connect.Errorf(connect.CodeInternal, "protocol error: incomplete envelope: %s", io.ErrUnexpectedEOF).WithCause(io.ErrUnexpectedEOF), true},
		{connect.Errorf(connect.CodeInternal, "a fault"), false},
		{connect.Errorf(connect.CodeInvalidArgument, "no lines"), false},
	} {
		if got := unknown(one.err); got != one.want {
			t.Errorf("%v: %t", one.err, got)
		}
	}
}
