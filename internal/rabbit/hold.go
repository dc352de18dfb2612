package rabbit

import (
	"sync"
	"time"
)

// hold bounds the bytes of the messages that came over a connection and are not handled. The broker hands out messages
// by number, however large they are; so beyond the limit nothing more is read, and TCP makes the broker wait.
type hold struct {
	mu    sync.Mutex
	limit int64 // 0 is none
	held  int64
	extra int64 // beyond the limit, because nothing was handled for long
	ended bool
	room  chan struct{} // closed when there is room again, or the connection ends; nil if nobody waits
}

// add counts what was read.
func (h *hold) add(bytes int64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.held += bytes
}

// release gives room for what was handled.
func (h *hold) release(bytes int64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.held -= bytes; h.held < h.limit {
		h.extra = 0
	}
	h.wake()
}

// end lets nobody wait any more.
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

// wake wakes the reader if there is room, with the mutex held.
func (h *hold) wake() {
	if h.room != nil && !h.isFull() {
		close(h.room)
		h.room = nil
	}
}

// full returns a channel that is closed when there is room, or nil if there is.
func (h *hold) full() <-chan struct{} {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.isFull() && h.room == nil {
		h.room = make(chan struct{})
	}
	return h.room
}

// grow makes room although there is none.
func (h *hold) grow() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.extra = max(h.extra, h.held-h.limit+trickle)
	h.wake()
}

const (
	// trickleInterval is how long nothing is read at most. A broker that could send nothing for some 30 s hangs up, and
	// counts a delivery of everything that it has sent.
	trickleInterval = 5 * time.Second
	// trickle is how many bytes are read then. Less might not open TCP's window.
	trickle = 256 << 10
)

// Hold has the connection read no more while the messages that came over it and were not released have that many bytes.
// One message is always read, however large it is. So that the connection stays alive, 256 KiB more are read each 5 s
// as long as none is released.
func (c *Connection) Hold(bytes int64) { c.network.messages.setLimit(bytes) }

// Release says that messages of that many bytes are handled.
func (c *Connection) Release(bytes int) { c.network.messages.release(int64(bytes)) }

// awaitRoom waits while the connection holds too much.
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
