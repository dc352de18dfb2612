package postgres

import (
	"net"
	"testing"
	"time"

	"example.com/shop/internal/dev/testenv"
	"golang.org/x/sys/unix"
)

// What the options do is the kernel's business: a host that vanishes without a word cannot be had in a test.
func TestConnectionsNoticeThatTheOtherSideIsGone(t *testing.T) {
	t.Parallel()
	conn, err := Connect(t.Context(), testenv.PostgresURL(t))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(t.Context())
	raw, err := conn.PgConn().Conn().(*net.TCPConn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	err = raw.Control(func(fd uintptr) {
		unacked, _ := unix.GetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT)
		idle, _ := unix.GetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_KEEPIDLE)
		if unacked != int(silence/time.Millisecond) || idle != int(silence/3/time.Second) {
			t.Errorf("user timeout is %d ms, keep-alive begins after %d s", unacked, idle)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
}
