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

// port is an operators' port. It says draining once drain was called, and ends with end or with the test.
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

// Probes are answered while the process drains, and say so.
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

// idle opens a connection that asks for something once and is idle then, until the test ends. It is an error if there is no answer.
func idle(t *testing.T, addr string) (net.Conn, error) {
	t.Helper()
	conn, err := net.DialTimeout("tcp", addr, 10*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	_ = conn.SetDeadline(time.Now().Add(20 * time.Second))
	_, _ = io.WriteString(conn, "GET /nowhere HTTP/1.1\r\nHost: localhost\r\n\r\n") // fails if it was closed at once
	_, err = conn.Read(make([]byte, 1024))
	return conn, err
}

// One address cannot take all connections, however many it opens: others are served, and so are probes.
func TestIdleConnectionsStarveNobody(t *testing.T) {
	t.Parallel()
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	conns := min(4096, int(limit.Cur)/4) // both ends are ours
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
	// Another address of this machine.
	dialer := &net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 2)}}
	client := &http.Client{Transport: &http.Transport{DialContext: dialer.DialContext, DisableKeepAlives: true}}
	response, err := client.Get(server.url + "/nowhere")
	if err != nil {
		t.Fatalf("another address: %v", err)
	}
	response.Body.Close()
}

// A connection that ends makes room for another.
func TestEndedConnectionsMakeRoom(t *testing.T) {
	t.Parallel()
	server := serve(t, rpcserver.Config{MaxConnsPerAddress: 3}, unary(echo))
	for range 3 {
		var open []net.Conn
		testenv.Eventually(t, 10*time.Second, func() error { // until the server has noticed that the former ones are closed
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
			t.Error("there is a fourth connection")
		}
		for _, conn := range open {
			conn.Close()
		}
	}
}
