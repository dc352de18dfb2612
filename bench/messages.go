package main

import (
	"context"
	"crypto/rand"
	"fmt"
	"time"

	"example.com/shop/internal/messaging"
	"example.com/shop/internal/ops"
	"example.com/shop/internal/outbox"
	"example.com/shop/internal/postgres"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	amqp "github.com/rabbitmq/amqp091-go"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

const (
	messageType = "google.protobuf.BytesValue"
	// payloadBytes is generous for a small protobuf event.
	payloadBytes = 512
	// keys is the number of different keys.
	keys = 1000
)

func makeMessages(n int) []messaging.Message {
	messages := make([]messaging.Message, n)
	for i := range messages {
		body := make([]byte, payloadBytes)
		_, _ = rand.Read(body) // never fails
		messages[i] = messaging.New(fmt.Sprintf("key-%d", i%keys), wrapperspb.Bytes(body))
		messages[i].CreatedAt = time.Now()
	}
	return messages
}

// insertAtOnce is the number of messages that each transaction inserts into a backlog. Few transactions are quick to
// prepare.
const insertAtOnce = 500

// backlog returns a function that prepares a database with n messages in the outbox.
func backlog(n int, shards int) func(ctx context.Context, url string) error {
	return func(ctx context.Context, url string) error {
		if err := migrated(ctx, url); err != nil {
			return err
		}
		return withPool(ctx, postgres.Config{URL: url}, func(db *pgxpool.Pool) error {
			if shards > 1 {
				if err := ops.SetShards(ctx, db, shards); err != nil {
					return err
				}
			}
			return inBatches(n, func(messages []messaging.Message) error {
				return postgres.Transact(ctx, db, func(tx pgx.Tx) error { return outbox.Insert(ctx, tx, messages...) })
			})
		})
	}
}

// inBatches calls insert with batches of n messages in total.
func inBatches(n int, insert func(messages []messaging.Message) error) error {
	for n > 0 {
		batch := min(n, insertAtOnce)
		if err := insert(makeMessages(batch)); err != nil {
			return err
		}
		n -= batch
	}
	return nil
}

// publishing returns a message as our relay sends it.
func publishing(m messaging.Message) amqp.Publishing {
	return amqp.Publishing{
		MessageId: m.ID.String(), Type: m.Type, ContentType: "application/protobuf", DeliveryMode: amqp.Persistent,
		Timestamp: m.CreatedAt, Headers: amqp.Table{messaging.KeyHeader: m.Key}, Body: m.Payload,
	}
}

// confirming is a plain channel of the client library in confirm mode.
type confirming struct {
	conn *amqp.Connection
	ch   *amqp.Channel
}

func openConfirming(url string) (*confirming, error) {
	conn, err := amqp.Dial(url)
	if err != nil {
		return nil, err
	}
	ch, err := conn.Channel()
	if err == nil {
		err = ch.Confirm(false)
	}
	if err != nil {
		conn.Close()
		return nil, err
	}
	return &confirming{conn, ch}, nil
}

func (c *confirming) close() { _ = c.conn.Close() }

func (c *confirming) publish(m messaging.Message) (*amqp.DeferredConfirmation, error) {
	return c.ch.PublishWithDeferredConfirm(exchange, m.Type, true, false, publishing(m))
}

// publishAll publishes with pipelined confirms, at most window of them outstanding.
func (c *confirming) publishAll(messages []messaging.Message, window int) error {
	pending := make(chan *amqp.DeferredConfirmation, window)
	failed := make(chan error, 1)
	go func() {
		defer close(failed)
		for confirm := range pending {
			if !confirm.Wait() {
				failed <- fmt.Errorf("not confirmed")
				for range pending { // keep the publisher from blocking on a full channel
				}
				return
			}
		}
	}()
	var err error
	for _, m := range messages {
		var confirm *amqp.DeferredConfirmation
		if confirm, err = c.publish(m); err != nil {
			break
		}
		pending <- confirm
	}
	close(pending)
	if unconfirmed := <-failed; err == nil {
		err = unconfirmed
	}
	return err
}
