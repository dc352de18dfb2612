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

	mu        sync.Mutex
	gathering bool
	buffer    []byte
}

// Write implements net.Conn. While gathering, it keeps p for later; the library's heartbeats queue up in order like everything else.
func (c *gatheringConn) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.gathering {
		return c.Conn.Write(p)
	}
	c.buffer = append(c.buffer, p...)
	if len(c.buffer) < gatherSize {
		return len(p), nil
	}
	return len(p), c.flush()
}

// gather calls fn and sends at its end what has not been sent by then.
func (c *gatheringConn) gather(fn func()) error {
	c.setGathering(true)
	fn()
	return c.setGathering(false)
}

func (c *gatheringConn) setGathering(on bool) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.gathering = on
	return c.flush()
}

func (c *gatheringConn) flush() error {
	if len(c.buffer) == 0 {
		return nil
	}
	_, err := c.Conn.Write(c.buffer)
	c.buffer = c.buffer[:0]
	return err
}
