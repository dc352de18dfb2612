package rabbit

import (
	"sync"
	"time"
)

// hold bounds the bytes of messages that were received over a connection and not handled. The broker's prefetch counts
// messages, whatever their size; so beyond the limit nothing more is read, and TCP makes the broker wait.
type hold struct {
	mu    sync.Mutex
	limit int64 // 0 means no limit
	held  int64
	extra int64 // allowed beyond the limit, because nothing has been handled for a long time
	ended bool
	room  chan struct{} // closed when there is room again or the connection ends; nil if nobody waits
}

// add counts bytes that were read.
func (h *hold) add(bytes int64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.held += bytes
}

// release frees the room of handled messages.
func (h *hold) release(bytes int64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.held -= bytes; h.held < h.limit {
		h.extra = 0
	}
	h.wake()
}

// end stops all waiting.
func (h *hold) end() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.ended = true
	h.wake()
}

func (h *hold) setLimit(bytes int64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.limit = bytes
	h.wake()
}

func (h *hold) isFull() bool { return h.limit > 0 && h.held >= h.limit+h.extra && !h.ended }

// wake wakes the reader if there is room. The caller must hold the mutex.
func (h *hold) wake() {
	if h.room != nil && !h.isFull() {
		close(h.room)
		h.room = nil
	}
}

// full returns a channel that is closed once there is room, or nil if there is room already.
func (h *hold) full() <-chan struct{} {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.isFull() && h.room == nil {
		h.room = make(chan struct{})
	}
	return h.room
}

// grow makes room beyond the limit.
func (h *hold) grow() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.extra = max(h.extra, h.held-h.limit+trickle)
	h.wake()
}

const (
	// trickleInterval is the longest time without a read. A broker that cannot send for about 30 s closes the connection,
	// and counts a delivery for every message that it has sent.
	trickleInterval = 5 * time.Second
	// trickle is the number of bytes read after that interval. Less might not open the TCP window.
	trickle = 256 << 10
)

// Hold sets a limit: the connection stops reading while the received messages that were not released have that many
// bytes or more. It always reads one message, however large. To keep the connection alive, it reads another 256 KiB
// every 5 s while nothing is released.
func (c *Connection) Hold(bytes int64) { c.network.messages.setLimit(bytes) }

// Release reports that messages of that many bytes are handled.
func (c *Connection) Release(bytes int) { c.network.messages.release(int64(bytes)) }

// awaitRoom waits while the unreleased messages exceed the limit.
func (c *readableConn) awaitRoom() {
	if room := c.messages.full(); room != nil {
		timer := time.AfterFunc(trickleInterval, c.messages.grow)
		defer timer.Stop()
		<-room
	}
}

// Close implements net.Conn.
func (c *readableConn) Close() error {
	c.messages.end()
	return c.Conn.Close()
}
