package rpcserver_test

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync"
	"syscall"
	"testing"
	"time"

	"example.com/shop/internal/dev/testenv"
	"example.com/shop/internal/rpcserver"
)

// port is an operators' port. It reports draining after a call of drain, and ends with a call of end or with the test.
type port struct {
	url, addr  string
	drain, end func()
}

func opsPort(t *testing.T, config rpcserver.OpsConfig) *port {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, drain := context.WithCancel(t.Context())
	ended, served := make(chan struct{}), make(chan error, 1)
	go func() { served <- rpcserver.NewOps(config).Serve(ctx, listener, ended) }()
	end := sync.OnceFunc(func() {
		close(ended)
		if err := <-served; err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(func() { drain(); end() })
	return &port{url: "http://" + listener.Addr().String(), addr: listener.Addr().String(), drain: drain, end: end}
}

// Probes are answered while the process drains, and report the drain.
func TestOperatorsPortAnswersDuringADrain(t *testing.T) {
	t.Parallel()
	metrics := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "metrics") })
	ops := opsPort(t, rpcserver.OpsConfig{Metrics: metrics})
	if code, body := get(t, ops.url+"/readyz"); code != 200 || body != `{"ready":true,"draining":false,"missing":[]}` {
		t.Errorf("at first: %d %s", code, body)
	}
	ops.drain()
	if code, body := get(t, ops.url+"/readyz"); code != 503 || body != `{"ready":false,"draining":true,"missing":[]}` {
		t.Errorf("during the drain: %d %s", code, body)
	}
	if code, body := get(t, ops.url+"/metrics"); code != 200 || body != "metrics" {
		t.Errorf("metrics during the drain: %d %s", code, body)
	}
	ops.end()
	if conn, err := net.Dial("tcp", ops.addr); err == nil {
		conn.Close()
		t.Error("the port is open after the end")
	}
}

// idle opens a connection, sends one request, and leaves the connection idle until the test ends. It returns an error
// if there is no answer.
func idle(t *testing.T, addr string) (net.Conn, error) {
	t.Helper()
	conn, err := net.DialTimeout("tcp", addr, 10*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	_ = conn.SetDeadline(time.Now().Add(20 * time.Second))
	// The write fails if the server has closed the connection at once.
	_, _ = io.WriteString(conn, "GET /nowhere HTTP/1.1\r\nHost: localhost\r\n\r\n")
	_, err = conn.Read(make([]byte, 1024))
	return conn, err
}

// One address cannot take all connections: the server still serves other addresses and probes.
func TestIdleConnectionsStarveNobody(t *testing.T) {
	t.Parallel()
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	conns := min(4096, int(limit.Cur)/4) // this process has both ends of each connection
	server := serve(t, rpcserver.Config{MaxConns: conns}, unary(echo))
	ops := opsPort(t, rpcserver.OpsConfig{})
	answered := 0
	for range conns {
		if _, err := idle(t, server.addr); err == nil {
			answered++
		}
	}
	if answered != conns/4 {
		t.Errorf("one address has %d of %d connections, want a quarter", answered, conns)
	}
	if code, body := get(t, ops.url+"/healthz"); code != 200 || body != "ok" {
		t.Errorf("/healthz: %d %s", code, body)
	}
	// 127.0.0.2 is another address of this machine.
	dialer := &net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 2)}}
	client := &http.Client{Transport: &http.Transport{DialContext: dialer.DialContext, DisableKeepAlives: true}}
	response, err := client.Get(server.url + "/nowhere")
	if err != nil {
		t.Fatalf("another address: %v", err)
	}
	response.Body.Close()
}

// A connection that ends frees a place for another one.
func TestEndedConnectionsFreePlaces(t *testing.T) {
	t.Parallel()
	server := serve(t, rpcserver.Config{MaxConnsPerAddress: 3}, unary(echo))
	for range 3 {
		var open []net.Conn
		// Until the server notices that the previous ones are closed.
		testenv.Eventually(t, 10*time.Second, func() error {
			for len(open) < 3 {
				conn, err := idle(t, server.addr)
				if err != nil {
					return err
				}
				open = append(open, conn)
			}
			return nil
		})
		if _, err := idle(t, server.addr); err == nil {
			t.Error("a fourth connection was accepted")
		}
		for _, conn := range open {
			conn.Close()
		}
	}
}
