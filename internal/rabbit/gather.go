package rabbit

import (
	"net"
	"sync"
)

// gatherSize is the number of bytes that are batched before a write: some hundred small messages, and less than the
// usual socket buffer.
const gatherSize = 64 << 10

// gatheringConn batches many publishings into one write. The client library flushes after each one, and the system
// calls for that, here and in the broker, cost more than the publishing itself.
type gatheringConn struct {
	net.Conn
	network  net.Conn // beneath TLS
	messages *hold

	mu        sync.Mutex
	gathering bool
	buffer    []byte
	failure   error // of a write: the broker may have seen part of a frame, so nothing can be sent after it
}

// Write implements net.Conn. While gathering, it buffers p; the library's heartbeats are buffered in order as well.
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

// gather calls fn, buffers what fn writes, and flushes the rest when fn returns.
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

// cut closes the network connection without the AMQP closing handshake.
func (c *gatheringConn) cut() {
	c.messages.end()
	_ = c.network.Close()
}
