//go:build unix

package testenv_test

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"example.com/shop/internal/dev/testenv"
)

func TestProxyForwardsPostgres(t *testing.T) {
	t.Parallel()
	proxy, url := testenv.ProxyURL(t, testenv.PostgresURL(t))
	conn, err := pgx.Connect(t.Context(), url)
	if err != nil {
		t.Fatalf("connect: %v", err)
	}
	defer conn.Close(context.Background())
	if err := conn.Ping(t.Context()); err != nil {
		t.Fatalf("ping: %v", err)
	}
	if cut := proxy.Cut(); cut != 1 {
		t.Errorf("cut %d connections, want 1", cut)
	}
	if err := conn.Ping(t.Context()); err == nil {
		t.Error("the connection survived the cut")
	}
}

func TestProxy(t *testing.T) {
	t.Parallel()

	t.Run("CutResets", func(t *testing.T) {
		t.Parallel()
		proxy := testenv.Proxy(t, echo(t))
		conn := dialTCP(t, proxy)
		roundTrip(t, conn)
		proxy.Cut()
		if _, err := conn.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("got %v, want a reset", err)
		}
		roundTrip(t, dialTCP(t, proxy)) // new connections work
	})

	t.Run("RefusesOnlyNewConnections", func(t *testing.T) {
		t.Parallel()
		proxy := testenv.Proxy(t, echo(t))
		old := dialTCP(t, proxy)
		roundTrip(t, old)
		proxy.Refuse(true)
		if err := readNew(proxy); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("got %v, want a reset", err)
		}
		roundTrip(t, old)
		proxy.Refuse(false)
		roundTrip(t, dialTCP(t, proxy))
	})

	t.Run("FreezeLosesNothing", func(t *testing.T) {
		t.Parallel()
		proxy := testenv.Proxy(t, echo(t))
		conn := dialTCP(t, proxy)
		roundTrip(t, conn)
		proxy.Freeze(true)
		if _, err := conn.Write([]byte("x")); err != nil {
			t.Fatalf("write: %v", err)
		}
		// Nothing signals the absence of data, so wait for a while.
		if err := conn.SetReadDeadline(time.Now().Add(100 * time.Millisecond)); err != nil {
			t.Fatalf("set deadline: %v", err)
		}
		buffer := make([]byte, 1)
		if n, err := conn.Read(buffer); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("got %d bytes, %v through a frozen proxy", n, err)
		}
		if err := conn.SetReadDeadline(time.Time{}); err != nil {
			t.Fatalf("set deadline: %v", err)
		}
		proxy.Freeze(false)
		if _, err := io.ReadFull(conn, buffer); err != nil || buffer[0] != 'x' {
			t.Errorf("got %q, %v after the freeze", buffer, err)
		}
	})

	t.Run("CutEndsFrozenConnections", func(t *testing.T) {
		t.Parallel()
		proxy := testenv.Proxy(t, echo(t))
		conn := dialTCP(t, proxy)
		roundTrip(t, conn)
		proxy.Freeze(true)
		if _, err := conn.Write([]byte("x")); err != nil {
			t.Fatalf("write: %v", err)
		}
		proxy.Cut()
		if _, err := conn.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("got %v, want a reset", err)
		}
	})

	t.Run("PassesOnACleanEnd", func(t *testing.T) {
		t.Parallel()
		conn := dialTCP(t, testenv.Proxy(t, echo(t)))
		roundTrip(t, conn)
		if err := conn.CloseWrite(); err != nil {
			t.Fatalf("close: %v", err)
		}
		if rest, err := io.ReadAll(conn); len(rest) != 0 || err != nil {
			t.Errorf("got %q, %v, want the end", rest, err)
		}
	})
}

// echo starts a server that returns the data that it receives. It returns its address.
func echo(t *testing.T) string {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatalf("listen: %v", err)
	}
	t.Cleanup(func() { listener.Close() })
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				_, _ = io.Copy(conn, conn)
			}()
		}
	}()
	return listener.Addr().String()
}

func dialTCP(t *testing.T, proxy *testenv.TCPProxy) *net.TCPConn {
	t.Helper()
	conn, err := net.Dial("tcp", proxy.Addr())
	if err != nil {
		t.Fatalf("dial: %v", err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn.(*net.TCPConn)
}

// readNew reads from a new connection. A refusing proxy may reset it during the dial or after it.
func readNew(proxy *testenv.TCPProxy) error {
	conn, err := net.Dial("tcp", proxy.Addr())
	if err != nil {
		return err
	}
	defer conn.Close()
	_, err = conn.Read(make([]byte, 1))
	return err
}

func roundTrip(t *testing.T, conn net.Conn) {
	t.Helper()
	if _, err := conn.Write([]byte("?")); err != nil {
		t.Fatalf("write: %v", err)
	}
	if _, err := io.ReadFull(conn, make([]byte, 1)); err != nil {
		t.Fatalf("read: %v", err)
	}
}
