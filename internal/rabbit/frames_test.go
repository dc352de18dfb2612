package rabbit

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"io"
	"net"
	"net/url"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// Frames that a broker sends on channel 0: type, channel, size, payload, end.
var (
	// blockedFrame is connection.blocked (class 10, method 60) with the reason "low".
	blockedFrame   = []byte{1, 0, 0, 0, 0, 0, 8, 0, 10, 0, 60, 3, 'l', 'o', 'w', 0xCE}
	unblockedFrame = []byte{1, 0, 0, 0, 0, 0, 4, 0, 10, 0, 61, 0xCE}
	heartbeatFrame = []byte{8, 0, 0, 0, 0, 0, 0, 0xCE}
	// ackFrame is the start of basic.ack (class 60, method 80) after type and channel. A tag and a flag follow.
	ackFrame = []byte{0, 0, 0, 13, 0, 60, 0, 80}
)

// alarm is a proxy for one connection that behaves like a broker that is short of memory. A real alarm would affect
// every publisher of the broker, including those of other tests.
type alarm struct {
	mu     sync.Mutex // of writes to the client, so that frames stay whole
	client net.Conn
	gate   chan struct{} // full during an alarm, when nothing from the client is forwarded
	acks   atomic.Int64  // sent by the client
}

func newAlarm(t *testing.T, rawURL string) (*alarm, string) {
	t.Helper()
	target, err := url.Parse(rawURL)
	if err != nil {
		t.Fatal(err)
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	broker := target.Host
	a := &alarm{gate: make(chan struct{}, 1)}
	var running sync.WaitGroup
	running.Go(func() {
		client, err := listener.Accept()
		if err != nil {
			return
		}
		defer client.Close()
		server, err := net.Dial("tcp", broker)
		if err != nil {
			return
		}
		defer server.Close()
		a.mu.Lock()
		a.client = client
		a.mu.Unlock()
		running.Go(func() { a.upstream(server, client); server.Close() })
		a.downstream(client, server)
	})
	t.Cleanup(func() {
		listener.Close()
		running.Wait()
	})
	target.Host = listener.Addr().String()
	return a, target.String()
}

// upstream forwards what the client sends, except during an alarm.
func (a *alarm) upstream(server, client net.Conn) {
	buffer := make([]byte, 32<<10)
	for {
		n, err := client.Read(buffer)
		a.acks.Add(int64(bytes.Count(buffer[:n], ackFrame)))
		a.gate <- struct{}{}
		_, failure := server.Write(buffer[:n])
		<-a.gate
		if err != nil || failure != nil {
			return
		}
	}
}

// downstream forwards what the broker sends, frame by frame.
func (a *alarm) downstream(client, server net.Conn) {
	const header = 7
	for from := bufio.NewReader(server); ; {
		frame := make([]byte, header)
		if _, err := io.ReadFull(from, frame); err != nil {
			return
		}
		frame = append(frame, make([]byte, binary.BigEndian.Uint32(frame[3:])+1)...)
		if _, err := io.ReadFull(from, frame[header:]); err != nil {
			return
		}
		a.send(frame)
	}
}

func (a *alarm) send(frame []byte) {
	a.mu.Lock()
	defer a.mu.Unlock()
	_, _ = a.client.Write(frame)
}

// raise blocks the client until the returned function is called. Meanwhile the client gets heartbeats, as from a real
// broker but more often.
func (a *alarm) raise() (lower func()) {
	a.gate <- struct{}{}
	a.send(blockedFrame)
	done := make(chan struct{})
	var beating sync.WaitGroup
	beating.Go(func() {
		ticker := time.NewTicker(20 * time.Millisecond)
		defer ticker.Stop()
		for {
			select {
			case <-done:
				return
			case <-ticker.C:
				a.send(heartbeatFrame)
			}
		}
	})
	return sync.OnceFunc(func() {
		close(done)
		beating.Wait()
		a.send(unblockedFrame)
		<-a.gate
	})
}
