package testenv

import (
	"net"
	"testing"
)

// FreeAddress is an address of this machine that nobody listens on, HOST:PORT, for a process that is told where to listen.
func FreeAddress(t testing.TB) string {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	if err := listener.Close(); err != nil {
		t.Fatal(err)
	}
	return listener.Addr().String()
}
