package rabbit

import (
	"context"
	"fmt"
	"testing"
	"time"

	"example.com/shop/internal/dev/testenv"
	"example.com/shop/internal/messaging"
	"github.com/google/go-cmp/cmp"
)

// gated is a Handler that announces each batch and blocks until release is closed or the drain timeout passes.
type gated struct {
	begun   recorder
	release chan struct{}
}

func newGated() gated { return gated{begun: make(recorder, 1000), release: make(chan struct{})} }

func (g gated) handle(ctx context.Context, deliveries []messaging.Delivery) error {
	g.begun <- deliveries
	select {
	case <-g.release:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func TestStop(t *testing.T) {
	t.Parallel()

	for name, prefetch := range map[string]int{"WithAllDelivered": 300, "WithMoreInTheQueue": 5} {
		t.Run("DeliveriesAreFinishedAndNotRedelivered/"+name, func(t *testing.T) {
			t.Parallel()
			const n = 100
			url, p := setUp(t)
			mustPublish(t, p, texts(0, n)...)
			gate := newGated()
			first := consume(t, ConsumerConfig{URL: url, Prefetch: prefetch, Batch: 1}, gate.handle)
			receive(t, gate.begun)
			ready(t, url, max(0, n-prefetch))
			first.cancel()
			close(gate.release)
			first.stop()
			done := 1 + len(gate.begun)
			// The broker may have delivered a few more messages for acks sent before the consumer noticed the stop.
			if delivered := min(prefetch, n); done < delivered || done > delivered+10 {
				t.Errorf("%d of %d deliveries were finished", done, delivered)
			}
			rest := make(recorder, n)
			consume(t, ConsumerConfig{URL: url, Batch: 1}, rest.handle)
			mustPublish(t, p, texts(n, 1)...) // arrives last, after the messages that are left in the queue
			for i, delivery := range rest.next(t, n+1-done) {
				if got := textOf(t, delivery.Payload); delivery.Count != 0 || got != fmt.Sprint(done+i) {
					t.Errorf("got %s with count %d, want %d", got, delivery.Count, done+i)
				}
			}
		})
	}

	t.Run("AnotherConsumerTakesOverWhenTheFirstHasFinished", func(t *testing.T) {
		t.Parallel()
		for name, prefetch := range map[string]int{"WithAllDelivered": 300, "WithMoreInTheQueue": 5} {
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				url, p := setUp(t)
				mustPublish(t, p, texts(0, 20)...)
				gate := newGated()
				first := consume(t, ConsumerConfig{URL: url, Prefetch: prefetch, Batch: 1}, gate.handle)
				receive(t, gate.begun)
				ready(t, url, max(0, 20-prefetch))
				second := standBy(t, url)
				first.cancel()
				// If the second consumer were active by now, it would get these messages.
				mustPublish(t, p, texts(20, 20)...)
				ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
				defer cancel()
				select {
				case early := <-second:
					t.Errorf("the second consumer got %s while the first was still handling", textOf(t, early.Body))
				case <-ctx.Done():
				}
				close(gate.release)
				first.stop()
				got := []string{"0"}
				for len(gate.begun) > 0 {
					got = append(got, valuesOf(t, <-gate.begun)...)
				}
				for len(got) < 40 {
					next := receive(t, second)
					if next.Redelivered {
						t.Error("a message was redelivered")
					}
					got = append(got, textOf(t, next.Body))
				}
				if diff := cmp.Diff(valuesOf(t, deliveriesOf(texts(0, 40))), got); diff != "" {
					t.Error(diff)
				}
			})
		}
	})

	t.Run("TheDrainTimeoutEndsAHandler", func(t *testing.T) {
		t.Parallel()
		url, p := setUp(t)
		mustPublish(t, p, texts(0, 3)...)
		gate := newGated()
		consumer := consume(t, ConsumerConfig{URL: url, DrainTimeout: 200 * time.Millisecond}, gate.handle)
		receive(t, gate.begun)
		started := time.Now()
		consumer.stop()
		if took := time.Since(started); took < 200*time.Millisecond || took > 5*time.Second {
			t.Errorf("took %s", took)
		}
		again := make(recorder, 10)
		consume(t, ConsumerConfig{URL: url}, again.handle)
		if got := again.next(t, 3); got[0].Count != 1 {
			t.Errorf("count %d, want 1", got[0].Count)
		}
	})

	t.Run("DeliveriesThatTheHandlerRefusesAreNotAcked", func(t *testing.T) {
		t.Parallel()
		url, p := setUp(t)
		mustPublish(t, p, texts(0, 3)...)
		begun := make(chan struct{}, 1000)
		config := ConsumerConfig{URL: url, Lanes: 2, DrainTimeout: 100 * time.Millisecond}
		consumer := consume(t, config, func(context.Context, []messaging.Delivery) error {
			begun <- struct{}{}
			return errHandler
		})
		receive(t, begun)
		consumer.stop()
		again := make(recorder, 10)
		consume(t, ConsumerConfig{URL: url}, again.handle)
		again.next(t, 3)
	})

	t.Run("ABlackHoleDoesNotDelayIt", func(t *testing.T) {
		t.Parallel()
		url, p := setUp(t)
		proxy, through := testenv.ProxyURL(t, url)
		got := make(recorder, 10)
		consumer := consume(t, ConsumerConfig{URL: through, DrainTimeout: 200 * time.Millisecond}, got.handle)
		mustPublish(t, p, texts(0, 1)...)
		got.next(t, 1)
		proxy.Freeze(true)
		started := time.Now()
		consumer.stop()
		if took := time.Since(started); took > 4*time.Second {
			t.Errorf("took %s", took)
		}
	})

	t.Run("ItEndsWhileConnectingToABlackHole", func(t *testing.T) {
		t.Parallel()
		proxy, through := testenv.ProxyURL(t, testenv.AMQP(t))
		proxy.Freeze(true)
		consumer := consume(t, ConsumerConfig{URL: through}, make(recorder).handle)
		started := time.Now()
		consumer.stop()
		if took := time.Since(started); took > 4*time.Second {
			t.Errorf("took %s", took)
		}
	})
}

func deliveriesOf(messages []messaging.Message) []messaging.Delivery {
	deliveries := make([]messaging.Delivery, len(messages))
	for i, message := range messages {
		deliveries[i].Payload = message.Payload
	}
	return deliveries
}
