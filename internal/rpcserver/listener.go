package rpcserver

import (
	"net"
	"sync"
	"time"

	"golang.org/x/net/netutil"
)

// limitListener bounds the number of connections, in all and of one address, and the time for which each may leave unread what is sent to it.
func limitListener(listener net.Listener, config Config) net.Listener {
	if config.MaxConnsPerAddress > 0 {
		listener = &fairListener{Listener: listener, most: config.MaxConnsPerAddress, open: make(map[string]int)}
	}
	return &patientListener{Listener: netutil.LimitListener(listener, config.MaxConns), patience: config.WriteTimeout}
}

// patientListener is for callers who take their time to read: http.Server could only bound the whole call, and a stream has no end.
type patientListener struct {
	net.Listener
	patience time.Duration
}

func (l *patientListener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return &deadlineConn{conn, l.patience}, nil
}

type deadlineConn struct {
	net.Conn
	patience time.Duration
}

func (c *deadlineConn) Write(p []byte) (int, error) {
	if err := c.SetWriteDeadline(time.Now().Add(c.patience)); err != nil {
		return 0, err
	}
	return c.Conn.Write(p)
}

// fairListener closes at once what comes from an address that has as many connections as one may have. To let it wait would let it hold up others.
type fairListener struct {
	net.Listener
	most int

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
	if l.open[from] >= l.most {
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
