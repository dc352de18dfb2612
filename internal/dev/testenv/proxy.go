//go:build unix

package testenv

import (
	"errors"
	"io"
	"net"
	"net/url"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// TCPProxy forwards connections to a server and breaks them on demand. It does not
// interpret the data. All methods are safe for concurrent use.
//
// Why not toxiproxy's package: its reset_peer toxic cannot reset connections that are
// already open, its timeout toxic drops data where Freeze delays it, and it turns a
// half-close into a full close.
type TCPProxy struct {
	listener net.Listener
	target   string
	running  sync.WaitGroup
	accepted atomic.Int64

	mu     sync.Mutex
	conns  map[*link]struct{}
	refuse bool
	closed bool
	thawed chan struct{} // closed unless frozen
}

// link is a forwarded connection.
type link struct {
	client, server *net.TCPConn
	done           chan struct{} // closed by reset
	once           sync.Once
}

// Proxy starts a proxy to a target, host:port, that stops when the test ends.
func Proxy(t testing.TB, target string) *TCPProxy {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatalf("listen: %v", err)
	}
	p := &TCPProxy{
		listener: listener,
		target:   target,
		conns:    make(map[*link]struct{}),
		thawed:   make(chan struct{}),
	}
	close(p.thawed)
	p.running.Go(p.accept)
	t.Cleanup(p.close)
	return p
}

// ProxyURL starts a proxy to the server of a URL, and returns it with the URL through
// the proxy.
func ProxyURL(t testing.TB, rawURL string) (*TCPProxy, string) {
	t.Helper()
	parsed, err := url.Parse(rawURL)
	if err != nil {
		t.Fatalf("parse url: %v", err)
	}
	p := Proxy(t, parsed.Host)
	parsed.Host = p.Addr()
	return p, parsed.String()
}

// Addr returns the address for clients, host:port.
func (p *TCPProxy) Addr() string { return p.listener.Addr().String() }

// Accepted returns the number of connections that clients have made so far, refused
// ones included.
func (p *TCPProxy) Accepted() int { return int(p.accepted.Load()) }

// Cut resets all current connections on both sides and returns their number. Data in
// flight is lost, as when a machine dies.
func (p *TCPProxy) Cut() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	for l := range p.conns {
		l.reset()
	}
	cut := len(p.conns)
	clear(p.conns)
	return cut
}

// Refuse makes new connections fail, or work again. It accepts and immediately resets
// them, because another process could take the port of a closed listener. Current
// connections continue; Cut ends them.
func (p *TCPProxy) Refuse(refuse bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.refuse = refuse
}

// Freeze stops forwarding in both directions without closing connections, or resumes
// it without losing data. New connections succeed but receive nothing, as with a router
// that drops packets only after the handshake.
func (p *TCPProxy) Freeze(freeze bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	select {
	case <-p.thawed:
		if freeze {
			p.thawed = make(chan struct{})
		}
	default:
		if !freeze {
			close(p.thawed)
		}
	}
}

func (p *TCPProxy) accept() {
	for {
		conn, err := p.listener.Accept()
		if err != nil {
			return // closed
		}
		p.accepted.Add(1)
		p.running.Go(func() { p.serve(conn.(*net.TCPConn)) })
	}
}

func (p *TCPProxy) serve(client *net.TCPConn) {
	server, err := p.dial()
	if err != nil {
		reset(client)
		return
	}
	l := &link{client: client, server: server, done: make(chan struct{})}
	if !p.add(l) {
		l.reset()
		return
	}
	var both sync.WaitGroup
	both.Go(func() { p.copy(l, server, client) })
	both.Go(func() { p.copy(l, client, server) })
	both.Wait()
	p.mu.Lock()
	delete(p.conns, l)
	p.mu.Unlock()
	client.Close()
	server.Close()
}

// dialPatience bounds the wait at the end of a test for a target that does not answer.
const dialPatience = 2 * time.Second

var errRefused = errors.New("refused")

func (p *TCPProxy) dial() (*net.TCPConn, error) {
	p.mu.Lock()
	refuse := p.refuse
	p.mu.Unlock()
	if refuse {
		return nil, errRefused
	}
	conn, err := net.DialTimeout("tcp", p.target, dialPatience)
	if err != nil {
		return nil, err
	}
	return conn.(*net.TCPConn), nil
}

// add returns false if the proxy refuses connections or was closed meanwhile.
func (p *TCPProxy) add(l *link) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.refuse || p.closed {
		return false
	}
	p.conns[l] = struct{}{}
	return true
}

// copy forwards one direction until either side ends it. It passes a clean end on for
// this direction only, because the other side may still send data. Any other end resets
// both sides.
func (p *TCPProxy) copy(l *link, to, from *net.TCPConn) {
	buffer := make([]byte, 32<<10)
	for {
		n, err := from.Read(buffer)
		// Wait between reading and writing, so that a freeze also delays data that was
		// read before it.
		if !p.passable(l) {
			return
		}
		if n > 0 {
			if _, err := to.Write(buffer[:n]); err != nil {
				l.reset()
				return
			}
		}
		if errors.Is(err, io.EOF) {
			_ = to.CloseWrite()
			return
		}
		if err != nil {
			l.reset()
			return
		}
	}
}

// passable waits while the proxy is frozen. It returns false if the connection is cut
// meanwhile.
func (p *TCPProxy) passable(l *link) bool {
	p.mu.Lock()
	thawed := p.thawed
	p.mu.Unlock()
	select {
	case <-l.done:
		return false
	case <-thawed:
		return true
	}
}

func (p *TCPProxy) close() {
	p.mu.Lock()
	p.closed = true
	p.mu.Unlock()
	p.listener.Close()
	p.Cut()
	p.running.Wait()
}

func (l *link) reset() {
	l.once.Do(func() {
		close(l.done)
		reset(l.client)
		reset(l.server)
	})
}

// reset closes a connection with RST instead of FIN.
func reset(conn *net.TCPConn) {
	_ = conn.SetLinger(0)
	conn.Close()
}
