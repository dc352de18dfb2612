package session_test

import (
	"net"
	"testing"
	"time"

	"example.com/shop/internal/dev/testenv"
	"example.com/shop/internal/session"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { testenv.Main(m) }

// silence is the value in package session.
const silence = 15 * time.Second

// A test cannot make a host vanish, so it checks the socket options. Their effect is the kernel's.
func TestConnectionsNoticeThatTheOtherSideIsGone(t *testing.T) {
	t.Parallel()
	conn, err := session.Connect(t.Context(), testenv.PostgresURL(t))
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
