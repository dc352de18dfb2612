package rabbit

import (
	"context"
	"errors"
	"fmt"
	"testing"

	"example.com/shop/internal/dev/testenv"
	"example.com/shop/internal/messaging"
	amqp "github.com/rabbitmq/amqp091-go"
)

// running is a Consumer under test.
type running struct {
	t      *testing.T
	cancel context.CancelFunc
	ended  chan error
}

// consume runs a Consumer of the default queue until the test ends or stop is called.
func consume(t *testing.T, config ConsumerConfig, handle Handler) *running {
	t.Helper()
	config.Topology, config.Queue = topology, queue
	ctx, cancel := context.WithCancel(t.Context())
	r := &running{t: t, cancel: cancel, ended: make(chan error, 1)}
	go func() {
		defer close(r.ended)
		r.ended <- NewConsumer(config, handle).Run(ctx)
	}()
	t.Cleanup(func() {
		cancel()
		for range r.ended {
		}
	})
	return r
}

// stop stops the consumer and waits until it has ended.
func (r *running) stop() {
	r.t.Helper()
	r.cancel()
	if err := <-r.ended; err != nil {
		r.t.Errorf("Run returned %v", err)
	}
}

// recorder is a Handler that passes all deliveries to the test.
type recorder chan []messaging.Delivery

func (r recorder) handle(_ context.Context, deliveries []messaging.Delivery) error {
	r <- deliveries
	return nil
}

// next returns the next n deliveries.
func (r recorder) next(t *testing.T, n int) []messaging.Delivery {
	t.Helper()
	var got []messaging.Delivery
	for len(got) < n {
		got = append(got, receive(t, r)...)
	}
	if len(got) > n {
		t.Fatalf("%d deliveries, want %d", len(got), n)
	}
	return got
}

// receive waits for a value from the code under test.
func receive[T any](t *testing.T, from <-chan T) T {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	select {
	case value := <-from:
		return value
	case <-ctx.Done():
		t.Fatalf("nothing received within %s", patience)
		panic("unreachable")
	}
}

// setUp makes a vhost with the topology.
func setUp(t *testing.T) (url string, p *Publisher) {
	t.Helper()
	url = testenv.AMQP(t)
	p = newPublisher(t, PublisherConfig{URL: url})
	mustPublish(t, p)
	return url, p
}

// ready waits until the default queue has this many messages that are not delivered.
func ready(t *testing.T, url string, want int) {
	t.Helper()
	awaitCount(t, url, queue, want)
}

// awaitCount waits until a queue has n messages that are not delivered.
func awaitCount(t *testing.T, url, queue string, n int) {
	t.Helper()
	ch := raw(t, url)
	testenv.Eventually(t, patience, func() error {
		state, err := ch.QueueDeclarePassive(queue, true, false, false, false, nil)
		if err == nil && state.Messages != n {
			err = fmt.Errorf("queue %s has %d messages, want %d", queue, state.Messages, n)
		}
		return err
	})
}

// standBy subscribes as a consumer does, and returns once the broker has registered it.
func standBy(t *testing.T, url string) <-chan amqp.Delivery {
	t.Helper()
	conn, err := Dial(t.Context(), url, "second")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(conn.HangUp)
	config := ConsumerConfig{Topology: topology, Queue: queue}
	consumer := NewConsumer(config, nil)
	_, source, err := consumer.subscribe(t.Context(), conn)
	if err != nil {
		t.Fatal(err)
	}
	return source
}

var errHandler = errors.New("the database is unavailable")
