package session

import (
	"syscall"

	"golang.org/x/sys/unix"
)

// limitSilence bounds how long sent data may stay without an acknowledgement; keep-alive only looks after connections
// that send nothing.
func limitSilence(_, _ string, conn syscall.RawConn) error {
	return conn.Control(func(fd uintptr) {
		// Without effect, and no harm, on a Unix socket.
		_ = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(silence.Milliseconds()))
	})
}
