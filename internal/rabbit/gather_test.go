package rabbit

import (
	"bytes"
	"errors"
	"net"
	"testing"
)

var errWrite = errors.New("connection reset")

// sink is a network connection that records writes, or fails them.
type sink struct {
	net.Conn
	writes [][]byte
	fail   bool
}

func (s *sink) Write(p []byte) (int, error) {
	if s.fail {
		return len(p) / 2, errWrite
	}
	s.writes = append(s.writes, bytes.Clone(p))
	return len(p), nil
}

func TestGatheringConn(t *testing.T) {
	t.Parallel()
	write := func(t *testing.T, conn net.Conn, p []byte) {
		t.Helper()
		if n, err := conn.Write(p); n != len(p) || err != nil {
			t.Fatalf("wrote %d of %d: %v", n, len(p), err)
		}
	}

	t.Run("SendsAtOnceUnlessItGathers", func(t *testing.T) {
		t.Parallel()
		to := &sink{}
		conn := &gatheringConn{Conn: to}
		write(t, conn, []byte("a"))
		write(t, conn, []byte("b"))
		if len(to.writes) != 2 {
			t.Errorf("%d writes, want 2", len(to.writes))
		}
	})

	t.Run("GathersInOrderAndSendsAtTheEnd", func(t *testing.T) {
		t.Parallel()
		to := &sink{}
		conn := &gatheringConn{Conn: to}
		write(t, conn, []byte("a"))
		err := conn.gather(func() {
			write(t, conn, []byte("b"))
			write(t, conn, []byte("c"))
			if len(to.writes) != 1 {
				t.Errorf("%d writes while gathering, want 1", len(to.writes))
			}
		})
		write(t, conn, []byte("d"))
		if got := string(bytes.Join(to.writes, []byte("|"))); err != nil || got != "a|bc|d" {
			t.Errorf("wrote %s, error %v", got, err)
		}
	})

	t.Run("SendsWhenTheBufferIsFull", func(t *testing.T) {
		t.Parallel()
		to := &sink{}
		conn := &gatheringConn{Conn: to}
		piece := bytes.Repeat([]byte("x"), gatherSize/4)
		err := conn.gather(func() {
			for range 9 {
				write(t, conn, piece)
			}
			if len(to.writes) != 2 {
				t.Errorf("%d writes while gathering 9/4 of the size, want 2", len(to.writes))
			}
		})
		if got := len(bytes.Join(to.writes, nil)); err != nil || got != 9*len(piece) {
			t.Errorf("wrote %d bytes, error %v", got, err)
		}
	})

	t.Run("ReportsAFailureAtTheEnd", func(t *testing.T) {
		t.Parallel()
		conn := &gatheringConn{Conn: &sink{fail: true}}
		if err := conn.gather(func() { write(t, conn, []byte("a")) }); !errors.Is(err, errWrite) {
			t.Errorf("got %v", err)
		}
	})

	t.Run("ReportsAnEarlierFailure", func(t *testing.T) {
		t.Parallel()
		to := &sink{fail: true}
		conn := &gatheringConn{Conn: to}
		err := conn.gather(func() {
			if _, err := conn.Write(make([]byte, gatherSize)); !errors.Is(err, errWrite) {
				t.Errorf("got %v from the write", err)
			}
			to.fail = false
		})
		if !errors.Is(err, errWrite) {
			t.Errorf("got %v", err)
		}
	})

	t.Run("SendsNothingAfterAFailure", func(t *testing.T) {
		t.Parallel()
		to := &sink{fail: true}
		conn := &gatheringConn{Conn: to}
		_, _ = conn.Write([]byte("a"))
		to.fail = false
		if _, err := conn.Write([]byte("b")); !errors.Is(err, errWrite) || len(to.writes) > 0 {
			t.Errorf("got %v and %d writes after a partial frame", err, len(to.writes))
		}
		err := conn.gather(func() { _, _ = conn.Write([]byte("c")) })
		if !errors.Is(err, errWrite) || len(to.writes) > 0 {
			t.Errorf("got %v and %d writes after a partial frame", err, len(to.writes))
		}
	})
}
