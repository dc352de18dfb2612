package rpcserver

import (
	"net"
	"sync"
	"time"

	"golang.org/x/net/netutil"
)

// limitListener bounds the number of connections, in total and per address, and the time of each write.
func limitListener(listener net.Listener, config Config) net.Listener {
	if config.MaxConnsPerAddress > 0 {
		listener = &fairListener{Listener: listener, limit: config.MaxConnsPerAddress, open: make(map[string]int)}
	}
	return &deadlineListener{Listener: netutil.LimitListener(listener, config.MaxConns), timeout: config.WriteTimeout}
}

// deadlineListener bounds the time of each write, for callers that do not read. http.Server could only bound the whole
// call, and a stream may run without an end.
type deadlineListener struct {
	net.Listener
	timeout time.Duration
}

func (l *deadlineListener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return &deadlineConn{conn, l.timeout}, nil
}

type deadlineConn struct {
	net.Conn
	timeout time.Duration
}

func (c *deadlineConn) Write(p []byte) (int, error) {
	if err := c.SetWriteDeadline(time.Now().Add(c.timeout)); err != nil {
		return 0, err
	}
	return c.Conn.Write(p)
}

// fairListener closes a new connection at once if its address has too many. If the connection waited instead, it would
// block the connections behind it.
type fairListener struct {
	net.Listener
	limit int

	mu   sync.Mutex
	open map[string]int // by network
}

func (l *fairListener) Accept() (net.Conn, error) {
	for {
		conn, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		from := network(conn.RemoteAddr().String())
		if l.enter(from) {
			return &fairConn{Conn: conn, leave: sync.OnceFunc(func() { l.leave(from) })}, nil
		}
		_ = conn.Close()
	}
}

func (l *fairListener) enter(from string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.open[from] >= l.limit {
		return false
	}
	l.open[from]++
	return true
}

func (l *fairListener) leave(from string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.open[from]--; l.open[from] == 0 {
		delete(l.open, from)
	}
}

type fairConn struct {
	net.Conn
	leave func()
}

func (c *fairConn) Close() error {
	defer c.leave()
	return c.Conn.Close()
}
