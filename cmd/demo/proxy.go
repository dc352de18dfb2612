//go:build unix

package main

import (
	"fmt"
	"io"
	"net"
	"sync"
	"time"
)

// proxy forwards TCP connections to the broker and cuts them on demand. Why not toxiproxy's package: it cannot reset
// connections that are already open (its reset_peer toxic sets SO_LINGER only as a connection starts), and it does not
// count them.
type proxy struct {
	listener net.Listener
	target   string
	running  sync.WaitGroup

	mu    sync.Mutex
	links map[*link]bool
}

// link is a forwarded connection.
type link struct{ client, server *net.TCPConn }

func newProxy(target string) (*proxy, error) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, fmt.Errorf("listen: %w", err)
	}
	p := &proxy{listener: listener, target: target, links: make(map[*link]bool)}
	p.running.Go(p.accept)
	return p, nil
}

func (p *proxy) addr() string { return p.listener.Addr().String() }

// open returns the number of connections.
func (p *proxy) open() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.links)
}

// cut resets all connections on both sides and returns their number. Data in flight is lost, as when a machine dies.
func (p *proxy) cut() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	for l := range p.links {
		l.reset()
	}
	cut := len(p.links)
	clear(p.links)
	return cut
}

// close may be called twice.
func (p *proxy) close() {
	p.listener.Close()
	p.cut()
	p.running.Wait()
}

func (p *proxy) accept() {
	for {
		conn, err := p.listener.Accept()
		if err != nil {
			return // closed
		}
		p.running.Go(func() { p.serve(conn.(*net.TCPConn)) })
	}
}

func (p *proxy) serve(client *net.TCPConn) {
	conn, err := net.DialTimeout("tcp", p.target, 5*time.Second)
	if err != nil {
		client.Close()
		return
	}
	l := &link{client, conn.(*net.TCPConn)}
	p.mu.Lock()
	p.links[l] = true
	p.mu.Unlock()
	// AMQP does not use half-closed connections: when one side ends, end the other.
	var both sync.WaitGroup
	forward := func(to, from *net.TCPConn) {
		_, _ = io.Copy(to, from) // the reason for its end does not matter
		l.close()
	}
	both.Go(func() { forward(l.server, l.client) })
	both.Go(func() { forward(l.client, l.server) })
	both.Wait()
	p.mu.Lock()
	delete(p.links, l)
	p.mu.Unlock()
}

func (l *link) close() {
	l.client.Close()
	l.server.Close()
}

// reset closes with RST instead of FIN.
func (l *link) reset() {
	_ = l.client.SetLinger(0)
	_ = l.server.SetLinger(0)
	l.close()
}
