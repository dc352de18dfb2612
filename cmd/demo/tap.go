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

// exchange is the service's default.
const exchange = "events"

// tap sees every copy of every message. It has its own queue on the exchange and a connection that the demo never cuts.
type tap struct {
	conn *amqp.Connection
	done chan struct{}
	// keys restricts the tap to the messages with these keys. Nil means all messages.
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

// openTap opens a tap for the messages with these keys. Nil means all messages.
func openTap(url string, keys []string) (*tap, error) {
	conn, err := amqp.Dial(url)
	if err != nil {
		return nil, fmt.Errorf("connect to rabbitmq: %w", err)
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
	// The service has not started yet. Declare the exchange as it does.
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

// distinct returns the number of messages seen, duplicates excluded.
func (t *tap) distinct() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return len(t.firsts)
}

// all returns the number of copies seen, and the first copy of each message in the order of arrival.
func (t *tap) all() (copies int, firsts []arrival) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.copies, slices.Clone(t.firsts)
}

// broken reports whether the tap has lost its connection.
func (t *tap) broken() bool {
	select {
	case <-t.done:
		return true
	default:
		return false
	}
}

// depth returns the number of messages on a queue.
func (t *tap) depth(queue string) (int, error) {
	channel, err := t.conn.Channel()
	if err != nil {
		return 0, err
	}
	defer channel.Close()
	state, err := channel.QueueDeclarePassive(queue, true, false, false, false, nil)
	if err != nil {
		return 0, fmt.Errorf("inspect queue %s: %w", queue, err)
	}
	return state.Messages, nil
}

// drained reports whether the groups' queues are empty, which includes the late copies that nothing else waits for.
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
