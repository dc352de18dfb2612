//go:build unix

package main

import (
	"io"
	"testing"

	"connectrpc.com/connect/v2"
)

func TestCallsWithoutAnAnswerAreRepeated(t *testing.T) {
	t.Parallel()
	const incomplete = "protocol error: incomplete envelope: %s"
	for _, test := range []struct {
		err  error
		want bool
	}{
		{connect.Errorf(connect.CodeUnavailable, "away"), true},
		{connect.Errorf(connect.CodeInternal, incomplete, io.ErrUnexpectedEOF).WithCause(io.ErrUnexpectedEOF), true},
		{connect.Errorf(connect.CodeInternal, "a fault"), false},
		{connect.Errorf(connect.CodeInvalidArgument, "no lines"), false},
	} {
		if got := unknown(test.err); got != test.want {
			t.Errorf("%v: got %t, want %t", test.err, got, test.want)
		}
	}
}
