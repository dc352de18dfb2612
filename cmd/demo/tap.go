//go:build unix

package main

import (
	"fmt"
	"slices"
	"sync"
	"time"

	"example.com/shop/internal/messaging"
	amqp "github.com/rabbitmq/amqp091-go"
)

// exchange is where the service publishes by default.
const exchange = "events"

// tap sees every copy of every message: a queue of its own on the exchange, over a connection that is never cut.
type tap struct {
	conn *amqp.Connection
	done chan struct{}
	// keys are those of the messages that count; nil if all do.
	keys map[string]bool

	mu     sync.Mutex
	copies int
	seen   map[string]bool
	firsts []arrival
}

// arrival is the first copy of a message.
type arrival struct {
	messageID string
	at        time.Time
}

// openTap opens the tap for the messages with one of some keys, or, if there are none, for all.
func openTap(url string, keys []string) (*tap, error) {
	conn, err := amqp.Dial(url)
	if err != nil {
		return nil, fmt.Errorf("connect the tap: %w", err)
	}
	t := &tap{conn: conn, done: make(chan struct{}), seen: map[string]bool{}}
	if keys != nil {
		t.keys = make(map[string]bool, len(keys))
		for _, key := range keys {
			t.keys[key] = true
		}
	}
	deliveries, err := t.listen()
	if err != nil {
		conn.Close()
		return nil, fmt.Errorf("open the tap: %w", err)
	}
	go func() {
		defer close(t.done)
		for delivery := range deliveries {
			if key, _ := delivery.Headers[messaging.KeyHeader].(string); t.keys == nil || t.keys[key] {
				t.see(delivery.MessageId)
			}
		}
	}()
	return t, nil
}

func (t *tap) listen() (<-chan amqp.Delivery, error) {
	channel, err := t.conn.Channel()
	if err != nil {
		return nil, err
	}
	// As the service declares it, which has not started yet.
	if err := channel.ExchangeDeclare(exchange, amqp.ExchangeTopic, true, false, false, false, nil); err != nil {
		return nil, err
	}
	queue, err := channel.QueueDeclare("", false, true, true, false, nil)
	if err != nil {
		return nil, err
	}
	if err := channel.QueueBind(queue.Name, "#", exchange, false, nil); err != nil {
		return nil, err
	}
	return channel.Consume(queue.Name, "", true, true, false, false, nil)
}

func (t *tap) see(messageID string) {
	now := time.Now()
	t.mu.Lock()
	defer t.mu.Unlock()
	t.copies++
	if !t.seen[messageID] {
		t.seen[messageID] = true
		t.firsts = append(t.firsts, arrival{messageID, now})
	}
}

// distinct returns how many messages were seen.
func (t *tap) distinct() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return len(t.firsts)
}

// all returns how many copies were seen, and the first one of each message in the order of their arrival.
func (t *tap) all() (copies int, firsts []arrival) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.copies, slices.Clone(t.firsts)
}

// broken tells whether the tap has gone blind.
func (t *tap) broken() bool {
	select {
	case <-t.done:
		return true
	default:
		return false
	}
}

// depth returns how many messages lie on a queue.
func (t *tap) depth(queue string) (int, error) {
	channel, err := t.conn.Channel()
	if err != nil {
		return 0, err
	}
	defer channel.Close()
	state, err := channel.QueueDeclarePassive(queue, true, false, false, false, nil)
	if err != nil {
		return 0, fmt.Errorf("look at queue %s: %w", queue, err)
	}
	return state.Messages, nil
}

// drained tells whether the groups' queues are empty: the last copies, which nobody waits for, are taken too.
func (t *tap) drained() bool {
	for _, group := range groups() {
		if depth, err := t.depth(queueOf(group)); err != nil || depth > 0 {
			return false
		}
	}
	return true
}

func (t *tap) close() {
	t.conn.Close()
	<-t.done
}
