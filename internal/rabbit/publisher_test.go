package rabbit

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"testing"

	"example.com/shop/internal/dev/testenv"
	"example.com/shop/internal/messaging"
	"github.com/google/go-cmp/cmp"
	amqp "github.com/rabbitmq/amqp091-go"
)

func TestPublish(t *testing.T) {
	t.Parallel()

	t.Run("ConfirmsAPageAndKeepsItsOrder", func(t *testing.T) {
		t.Parallel()
		url, p := setUp(t)
		messages := texts(0, 500)
		mustPublish(t, p, messages...)
		var want, got []string
		for _, message := range messages {
			want = append(want, message.ID.String())
		}
		for _, delivery := range take(t, url, queue) {
			got = append(got, delivery.MessageId)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Error(diff)
		}
	})

	t.Run("HasTwoReceiptsInFlight", func(t *testing.T) {
		t.Parallel()
		url, p := setUp(t)
		first := publish(t, p, texts(0, 300)...)
		second := publish(t, p, texts(300, 300)...)
		all(t, wait(t, first), nil, 300)
		third := publish(t, p, texts(600, 300)...)
		all(t, wait(t, second), nil, 300)
		all(t, wait(t, third), nil, 300)
		if got := len(take(t, url, queue)); got != 900 {
			t.Errorf("%d messages in the queue, want 900", got)
		}
	})

	t.Run("ReportsExactlyTheUnroutable", func(t *testing.T) {
		t.Parallel()
		url, p := setUp(t)
		var messages []messaging.Message
		for i := range 1000 {
			if i%3 == 0 {
				messages = append(messages, number(int64(i)))
			} else {
				messages = append(messages, texts(i, 1)...)
			}
		}
		// Two receipts, so that returns of the second arrive while the first is processed.
		first, second := publish(t, p, messages[:500]...), publish(t, p, messages[500:]...)
		verdicts := append(wait(t, first), wait(t, second)...)
		for i, verdict := range verdicts {
			if returned := errors.Is(verdict, messaging.ErrReturned); returned != (i%3 == 0) || !returned &&
				verdict != nil {
				t.Errorf("message %d: %v", i, verdict)
			}
		}
		if got := len(take(t, url, queue)); got != 666 {
			t.Errorf("%d messages in the queue, want 666", got)
		}
	})

	t.Run("JoinsReturnsToTheRightOneOfTwoMessagesWithOneID", func(t *testing.T) {
		t.Parallel()
		url, p := setUp(t)
		var messages []messaging.Message
		for i := range 50 {
			routable, unroutable := text("k", fmt.Sprint(i)), number(int64(i))
			unroutable.ID = routable.ID
			pair := []messaging.Message{routable, unroutable}
			if i%2 == 1 {
				slices.Reverse(pair)
			}
			messages = append(messages, pair...)
		}
		// All messages are written before the first verdict is read, so returns of later messages may already be buffered.
		first, second := publish(t, p, messages[:51]...), publish(t, p, messages[51:]...)
		for i, verdict := range append(wait(t, first), wait(t, second)...) {
			unroutable := messages[i].Type != topology.Queues[0].Types[0]
			if returned := errors.Is(verdict, messaging.ErrReturned); returned != unroutable || !returned &&
				verdict != nil {
				t.Errorf("message %d of type %s: %v", i, messages[i].Type, verdict)
			}
		}
		if got := len(take(t, url, queue)); got != 50 {
			t.Errorf("%d messages in the queue, want 50", got)
		}
		if waiting := len(p.link.returned); waiting != 0 {
			t.Errorf("%d returns belong to no message", waiting)
		}
	})

	t.Run("RefusesToExceedTheWindow", func(t *testing.T) {
		t.Parallel()
		p := newPublisher(t, PublisherConfig{URL: testenv.AMQP(t), Window: 10})
		receipt := publish(t, p, texts(0, 6)...)
		if _, err := p.Publish(t.Context(), texts(6, 5)); err == nil {
			t.Error("11 messages in a window of 10 were accepted")
		}
		all(t, wait(t, receipt), nil, 6)
		mustPublish(t, p, texts(6, 10)...)
	})

	t.Run("ReturnsTheVerdictsAgain", func(t *testing.T) {
		t.Parallel()
		_, p := setUp(t)
		receipt := publish(t, p, texts(0, 100)...)
		ended, end := context.WithCancel(t.Context())
		end()
		for _, verdict := range receipt.Wait(ended) {
			if verdict != nil && (!errors.Is(verdict, messaging.ErrUnknown) || !errors.Is(verdict, context.Canceled)) {
				t.Fatalf("got %v, want unknown because of the context", verdict)
			}
		}
		all(t, wait(t, receipt), nil, 100)
		all(t, wait(t, receipt), nil, 100)
		mustPublish(t, p, texts(100, 1000)...) // the window is free again
	})

	t.Run("ReportsNacks", func(t *testing.T) {
		t.Parallel()
		url := testenv.AMQP(t)
		full := Topology{Exchange: exchange}
		declareFull(t, raw(t, url), 5)
		p := newPublisher(t, PublisherConfig{URL: url, Topology: full})
		messages := texts(0, 20)
		verdicts := wait(t, publish(t, p, messages...))
		all(t, verdicts[:5], nil, 5)
		all(t, verdicts[5:], messaging.ErrNacked, 15)
		noneLost(t, url, messages, verdicts)
		mustPublish(t, p, texts(20, 5)...) // the queue is empty again, and the connection is still usable
	})
}

// declareFull declares the default queue with other arguments: it accepts n messages and nacks the rest.
func declareFull(t *testing.T, ch *amqp.Channel, n int) {
	t.Helper()
	arguments := amqp.Table{"x-max-length": n, "x-overflow": "reject-publish"}
	_, err := ch.QueueDeclare(queue, true, false, false, false, arguments)
	err = errors.Join(err, ch.ExchangeDeclare(exchange, "topic", true, false, false, false, nil),
		ch.QueueBind(queue, "#", exchange, false, nil))
	if err != nil {
		t.Fatalf("declare: %v", err)
	}
}

// wantUnknown fails the test unless all n verdicts are unknown, and none is a refusal.
func wantUnknown(t *testing.T, verdicts []error, n int) {
	t.Helper()
	all(t, verdicts, messaging.ErrUnknown, n)
	for i, verdict := range verdicts {
		if errors.Is(verdict, messaging.ErrRefused) {
			t.Fatalf("verdict %d is %v", i, verdict)
		}
	}
}
