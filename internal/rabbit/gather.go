package rabbit

import (
	"net"
	"sync"
)

// gatherSize is how much is gathered before it is sent: some hundred small messages, and less than a socket's usual buffer.
const gatherSize = 64 << 10

// gatheringConn sends many publishings in one write. The client library flushes after each one, and the system calls for that, here and
// in the broker, cost more than the publishing itself.
type gatheringConn struct {
	net.Conn
	network  net.Conn // beneath TLS
	messages *hold

	mu        sync.Mutex
	gathering bool
	buffer    []byte
	failure   error // of a write: the broker saw part of a frame at best, and nothing that is sent after it would make sense
}

// Write implements net.Conn. While gathering, it keeps p for later; the library's heartbeats queue up in order like everything else.
func (c *gatheringConn) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.buffer = append(c.buffer, p...)
	if c.gathering && c.failure == nil && len(c.buffer) < gatherSize {
		return len(p), nil
	}
	if err := c.flush(); err != nil {
		return 0, err
	}
	return len(p), nil
}

// gather calls fn and sends at its end what has not been sent by then.
func (c *gatheringConn) gather(fn func()) error {
	c.setGathering(true)
	fn()
	c.setGathering(false)
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.flush()
}

func (c *gatheringConn) setGathering(on bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.gathering = on
}

func (c *gatheringConn) flush() error {
	if c.failure == nil && len(c.buffer) > 0 {
		_, c.failure = c.Conn.Write(c.buffer)
	}
	c.buffer = c.buffer[:0]
	return c.failure
}

// cut ends the connection without a word.
func (c *gatheringConn) cut() {
	c.messages.end()
	_ = c.network.Close()
}
