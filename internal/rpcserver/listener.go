package rpcserver

import (
	"net"
	"time"

	"golang.org/x/net/netutil"
)

// limitListener bounds the number of connections, and the time for which each may leave unread what is sent to it.
func limitListener(listener net.Listener, config Config) net.Listener {
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
	return &patientConn{conn, l.patience}, nil
}

type patientConn struct {
	net.Conn
	patience time.Duration
}

func (c *patientConn) Write(p []byte) (int, error) {
	if err := c.SetWriteDeadline(time.Now().Add(c.patience)); err != nil {
		return 0, err
	}
	return c.Conn.Write(p)
}
