package rabbit

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"example.com/shop/internal/dev/testenv"
)

// dial connects as the code under test does, until the test ends.
func dial(t *testing.T, url string) *Connection {
	t.Helper()
	conn, err := Dial(t.Context(), url, "test")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(conn.HangUp)
	return conn
}

// Twenty processes that start simultaneously on an empty broker create working queues, in each of several rounds.
func TestManyProcessesStartAtOnce(t *testing.T) {
	t.Parallel()
	const processes, rounds = 20, 3
	wide := Topology{Exchange: exchange}
	for i := range 4 {
		wide.Queues = append(wide.Queues, Queue{Name: fmt.Sprint("group-", i), Types: topology.Queues[0].Types})
	}
	for round := range rounds {
		url := testenv.AMQP(t)
		ready, failures := make(chan struct{}), make([]error, processes)
		var all sync.WaitGroup
		for i := range processes {
			conn := dial(t, url)
			all.Go(func() {
				<-ready
				failures[i] = wide.ensure(t.Context(), conn)
			})
		}
		close(ready)
		all.Wait()
		if err := errors.Join(failures...); err != nil {
			t.Fatalf("round %d: %v", round, err)
		}
		mustPublish(t, newPublisher(t, PublisherConfig{URL: url, Topology: wide}), texts(0, 10)...)
		for _, queue := range wide.Queues {
			if got := len(take(t, url, queue.Name)); got != 10 {
				t.Errorf("round %d: queue %s has %d messages, want 10", round, queue.Name, got)
			}
		}
	}
}

// While one process declares, no other does.
func TestOneProcessDeclaresAtATime(t *testing.T) {
	t.Parallel()
	url := testenv.AMQP(t)
	first, second := dial(t, url), dial(t, url)
	unlock, err := topology.lock(first)
	if err != nil {
		t.Fatal(err)
	}
	short, cancel := context.WithTimeout(t.Context(), 2*declarePause)
	defer cancel()
	if err := topology.ensure(short, second); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("while another declares: %v", err)
	}
	if missing, _, err := topology.Compare(t.Context(), url); err != nil || len(missing) != 2 {
		t.Fatalf("declared while another declares: missing %q, %v", missing, err)
	}
	waiting := make(chan error)
	go func() { waiting <- topology.ensure(t.Context(), second) }()
	unlock()
	if err := <-waiting; err != nil {
		t.Fatal(err)
	}
	// If the topology is complete, no lock is needed: a process that restarts does not wait.
	if unlock, err = topology.lock(first); err != nil {
		t.Fatal(err)
	}
	defer unlock()
	if err := topology.ensure(t.Context(), second); err != nil {
		t.Error(err)
	}
}

// The lock of a process that dies is released.
func TestADeadProcessHoldsUpNobody(t *testing.T) {
	t.Parallel()
	url := testenv.AMQP(t)
	dead := dial(t, url)
	if _, err := topology.lock(dead); err != nil {
		t.Fatal(err)
	}
	dead.Cut()
	if err := topology.ensure(t.Context(), dial(t, url)); err != nil {
		t.Error(err)
	}
}

// A user who may configure only the exchange and the queues can declare them.
func TestDeclaringNeedsNoFurtherPermission(t *testing.T) {
	t.Parallel()
	own := Only(append(topology.queueNames(), exchange, "amq.default")...) // the last one is for dead-lettering
	url := testenv.Management(t, testenv.AMQP(t)).User(own, own, own)
	if err := topology.Declare(t.Context(), url); err != nil {
		t.Error(err)
	}
}

func TestAQueueThatAnswersInternalError(t *testing.T) {
	t.Parallel()

	t.Run("IsRetried", func(t *testing.T) {
		t.Parallel()
		faulty := newFaultyBroker(t, testenv.AMQP(t), queue, 2)
		if err := topology.Declare(t.Context(), faulty.url); err != nil || faulty.left.Load() >= 0 {
			t.Errorf("got %v, %d refusals left", err, faulty.left.Load())
		}
	})

	t.Run("IsNamedInEveryError", func(t *testing.T) {
		t.Parallel()
		url := testenv.AMQP(t)
		if err := topology.Declare(t.Context(), url); err != nil {
			t.Fatal(err)
		}
		faulty := newFaultyBroker(t, url, queue, 1000)
		given := topology
		given.Given = true
		_, read := NewGauge(faulty.url, "test").Read(t.Context(), []string{queue})
		_, _, compared := topology.Compare(t.Context(), faulty.url)
		publisher := newPublisher(t, PublisherConfig{URL: faulty.url, Topology: given})
		_, published := publisher.Publish(t.Context(), texts(0, 1))
		declared := topology.Declare(t.Context(), faulty.url)
		for name, err := range map[string]error{
			"Declare": declared, "Read": read, "Compare": compared, "Publish": published,
		} {
			if !errors.Is(err, ErrQueueBroken) {
				t.Errorf("%s: got %v, want ErrQueueBroken", name, err)
				continue
			}
			if text := err.Error(); !strings.Contains(text, queue) || strings.Contains(text, "does not exist") {
				t.Errorf("%s: %s", name, text)
			}
		}
	})
}

// faultyBroker is a proxy that answers INTERNAL_ERROR when a queue is declared, as RabbitMQ does for a quorum queue
// without working members.
type faultyBroker struct {
	url  string
	left atomic.Int64 // remaining refusals; negative after a declaration that was not refused
}

func newFaultyBroker(t *testing.T, rawURL, queue string, refusals int64) *faultyBroker {
	t.Helper()
	target, err := url.Parse(rawURL)
	if err != nil {
		t.Fatal(err)
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	b := &faultyBroker{}
	b.left.Store(refusals)
	broker := target.Host
	var running sync.WaitGroup
	running.Go(func() {
		for {
			client, err := listener.Accept()
			if err != nil {
				return
			}
			running.Go(func() { b.serve(client, broker, queue) })
		}
	})
	t.Cleanup(func() {
		listener.Close()
		running.Wait()
	})
	target.Host = listener.Addr().String()
	b.url = target.String()
	return b
}

// serve forwards a connection until one side ends it, or until it refuses a declaration of the queue.
func (b *faultyBroker) serve(client net.Conn, broker, queue string) {
	defer client.Close()
	server, err := net.Dial("tcp", broker)
	if err != nil {
		return
	}
	defer server.Close()
	go func() { _, _ = io.Copy(client, server); client.Close() }()
	from := bufio.NewReader(client)
	if _, err := io.CopyN(server, from, int64(len("AMQP0091"))); err != nil {
		return
	}
	// queue.declare, as it follows type, channel and size
	declares := append([]byte{0, 50, 0, 10, 0, 0, byte(len(queue))}, queue...)
	for {
		frame := make([]byte, 7)
		if _, err := io.ReadFull(from, frame); err != nil {
			return
		}
		frame = append(frame, make([]byte, binary.BigEndian.Uint32(frame[3:])+1)...)
		if _, err := io.ReadFull(from, frame[7:]); err != nil {
			return
		}
		if frame[0] == 1 && bytes.HasPrefix(frame[7:], declares) && b.left.Add(-1) >= 0 {
			_, _ = client.Write(closeFrame)
			_ = client.SetReadDeadline(time.Now().Add(time.Second))
			_, _ = io.Copy(io.Discard, from) // the client's response
			return
		}
		if _, err := server.Write(frame); err != nil {
			return
		}
	}
}

// closeFrame is connection.close (class 10, method 50) with code 541 for queue.declare.
var closeFrame = func() []byte {
	const text = "INTERNAL_ERROR"
	payload := append([]byte{0, 10, 0, 50, 541 >> 8, 541 & 0xFF, byte(len(text))}, text...)
	payload = append(payload, 0, 50, 0, 10)
	return append(append([]byte{1, 0, 0, 0, 0, 0, byte(len(payload))}, payload...), 0xCE)
}()
