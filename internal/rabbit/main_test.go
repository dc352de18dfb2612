package rabbit

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"example.com/shop/internal/dev/testenv"
	"example.com/shop/internal/messaging"
	amqp "github.com/rabbitmq/amqp091-go"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

func TestMain(m *testing.M) { testenv.Main(m) }

const (
	exchange = "events"
	queue    = "probes"
	// patience is how long a test waits for an event before it fails.
	patience = 20 * time.Second
)

// topology has one queue, for text probes. Number probes are unroutable.
var topology = Topology{
	Exchange: exchange,
	Queues:   []Queue{{Name: queue, Types: []string{"google.protobuf.StringValue"}}},
}

func text(key, value string) messaging.Message { return messaging.New(key, wrapperspb.String(value)) }
func number(value int64) messaging.Message     { return messaging.New("", wrapperspb.Int64(value)) }

// texts makes n messages with the values from first on.
func texts(first, n int) []messaging.Message {
	messages := make([]messaging.Message, n)
	for i := range messages {
		messages[i] = text("", fmt.Sprint(first+i))
	}
	return messages
}

// newPublisher makes a publisher that is closed at the end of the test. A zero topology means the default topology.
func newPublisher(t *testing.T, config PublisherConfig) *Publisher {
	t.Helper()
	if config.Topology.Exchange == "" {
		config.Topology = topology
	}
	p := NewPublisher(config)
	t.Cleanup(func() { _ = p.Close() })
	return p
}

func publish(t *testing.T, p *Publisher, messages ...messaging.Message) messaging.Receipt {
	t.Helper()
	receipt, err := p.Publish(t.Context(), messages)
	if err != nil {
		t.Fatalf("publish: %v", err)
	}
	return receipt
}

// mustPublish publishes, and fails the test unless everything is confirmed.
func mustPublish(t *testing.T, p *Publisher, messages ...messaging.Message) {
	t.Helper()
	verdicts := wait(t, publish(t, p, messages...))
	if err := errors.Join(verdicts...); err != nil || len(verdicts) != len(messages) {
		t.Fatalf("%d verdicts on %d messages, errors: %v", len(verdicts), len(messages), err)
	}
}

// wait waits for the verdicts, and fails the test if they take longer than patience.
func wait(t *testing.T, receipt messaging.Receipt) []error {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	verdicts := receipt.Wait(ctx)
	if ctx.Err() != nil {
		t.Fatalf("no verdicts within %s", patience)
	}
	return verdicts
}

// all fails the test unless there are n verdicts, each of which is want.
func all(t *testing.T, verdicts []error, want error, n int) {
	t.Helper()
	if len(verdicts) != n {
		t.Fatalf("%d verdicts, want %d", len(verdicts), n)
	}
	for i, verdict := range verdicts {
		if !errors.Is(verdict, want) {
			t.Fatalf("verdict %d is %v, want %v", i, verdict, want)
		}
	}
}

// raw opens a channel without the code under test.
func raw(t *testing.T, url string) *amqp.Channel {
	t.Helper()
	conn, err := amqp.Dial(url)
	if err != nil {
		t.Fatalf("dial: %v", err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	ch, err := conn.Channel()
	if err != nil {
		t.Fatalf("open channel: %v", err)
	}
	return ch
}

// take removes all ready messages from a queue. It consumes, because RabbitMQ refuses basic.get on a queue with a
// single active consumer.
func take(t *testing.T, url, queue string) []amqp.Delivery {
	t.Helper()
	ch := raw(t, url)
	defer ch.Close()
	state, err := ch.QueueDeclarePassive(queue, true, false, false, false, nil)
	if err != nil {
		t.Fatalf("count messages: %v", err)
	}
	source, err := ch.Consume(queue, "", true, false, false, false, nil)
	if err != nil {
		t.Fatalf("consume: %v", err)
	}
	taken := make([]amqp.Delivery, state.Messages)
	for i := range taken {
		taken[i] = receive(t, source)
	}
	return taken
}

func textOf(t *testing.T, payload []byte) string {
	t.Helper()
	var value wrapperspb.StringValue
	if err := proto.Unmarshal(payload, &value); err != nil {
		t.Fatalf("decode payload: %v", err)
	}
	return value.GetValue()
}

// noneLost fails the test if a message that was reported as published is missing from the queue.
func noneLost(t *testing.T, url string, messages []messaging.Message, verdicts []error) {
	t.Helper()
	stored := map[string]bool{}
	for _, delivery := range take(t, url, queue) {
		stored[delivery.MessageId] = true
	}
	for i, verdict := range verdicts {
		if verdict == nil && !stored[messages[i].ID.String()] {
			t.Errorf("message %d was reported as published but is not in the queue", i)
		}
	}
}
