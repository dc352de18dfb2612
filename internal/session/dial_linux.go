package session

import (
	"syscall"

	"golang.org/x/sys/unix"
)

// limitSilence bounds how long sent data may stay unacknowledged. Keep-alive covers only idle connections.
func limitSilence(_, _ string, conn syscall.RawConn) error {
	return conn.Control(func(fd uintptr) {
		// A Unix socket refuses the option and does not need it.
		_ = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(silence.Milliseconds()))
	})
}
