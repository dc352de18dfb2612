package main

import (
	"context"
	"crypto/rand"
	"fmt"
	"time"

	"example.com/orders/internal/messaging"
	amqp "github.com/rabbitmq/amqp091-go"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// window is how many messages the raw publisher has without confirm: as many as the relay by default.
const window = 2000

// queueArguments are those of a consumer group's queue.
var queueArguments = amqp.Table{
	"x-queue-type": "quorum", "x-single-active-consumer": true, "x-delivery-limit": 20, "x-overflow": "reject-publish",
	"x-dead-letter-exchange": "", "x-dead-letter-routing-key": "bench.dead", "x-dead-letter-strategy": "at-least-once",
}

func makeMessages(n, payload int) []messaging.Message {
	messages := make([]messaging.Message, n)
	for i := range messages {
		body := make([]byte, payload)
		_, _ = rand.Read(body) // never fails
		messages[i] = messaging.New(fmt.Sprintf("key-%d", i%1000), wrapperspb.Bytes(body))
		messages[i].CreatedAt = time.Now()
	}
	return messages
}

// measureRaw publishes messages with pipelined confirms, mandatory and persistent, on one channel, over the same route (topic exchange, one
// binding) to the same kind of queue: what the client library and the broker can do at most.
func measureRaw(ctx context.Context, url string, messages []messaging.Message) (result, error) {
	conn, err := amqp.Dial(url)
	if err != nil {
		return result{}, err
	}
	defer conn.Close()
	ch, err := conn.Channel()
	if err != nil {
		return result{}, err
	}
	const queue = "bench.raw"
	if _, err := ch.QueueDeclare(queue, true, false, false, false, queueArguments); err != nil {
		return result{}, err
	}
	defer ch.QueueDelete(queue, false, false, false)
	const route = "bench.raw"
	if err := ch.ExchangeDeclare(route, amqp.ExchangeTopic, true, false, false, false, nil); err != nil {
		return result{}, err
	}
	defer ch.ExchangeDelete(route, false, false)
	if err := ch.QueueBind(queue, messages[0].Type, route, false, nil); err != nil {
		return result{}, err
	}
	if err := ch.Confirm(false); err != nil {
		return result{}, err
	}
	started := time.Now()
	pending := make(chan *amqp.DeferredConfirmation, window)
	failed := make(chan error, 1)
	go func() {
		defer close(failed)
		for confirm := range pending {
			if !confirm.Wait() {
				failed <- fmt.Errorf("not confirmed")
				return
			}
		}
	}()
	for _, m := range messages {
		confirm, err := ch.PublishWithDeferredConfirmWithContext(ctx, route, m.Type, true, false, amqp.Publishing{
			MessageId: m.ID.String(), Type: m.Type, ContentType: "application/protobuf", DeliveryMode: amqp.Persistent,
			Timestamp: m.CreatedAt, Headers: amqp.Table{"message-key": m.Key}, Body: m.Payload,
		})
		if err != nil {
			return result{}, err
		}
		pending <- confirm
	}
	close(pending)
	if err := <-failed; err != nil {
		return result{}, err
	}
	return result{took: time.Since(started)}, nil
}
