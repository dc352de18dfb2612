package rabbit

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"example.com/shop/internal/dev/testenv"
	"example.com/shop/internal/messaging"
	amqp "github.com/rabbitmq/amqp091-go"
)

func TestPublishWhenTheBrokerRefuses(t *testing.T) {
	t.Parallel()
	size := testenv.Oversized(t)
	oversized := func() messaging.Message { return text("", strings.Repeat("x", size)) }

	t.Run("AnOversizedMessageAloneIsRefused", func(t *testing.T) {
		t.Parallel()
		_, p := setUp(t)
		all(t, wait(t, publish(t, p, oversized())), messaging.ErrRefused, 1)
		mustPublish(t, p, texts(0, 1)...)
	})

	t.Run("NoMessageOfItsPageIsLost", func(t *testing.T) {
		t.Parallel()
		url, p := setUp(t)
		messages := append(append(texts(0, 50), oversized()), texts(50, 50)...)
		first, second := publish(t, p, messages...), publish(t, p, texts(100, 50)...)
		verdicts := wait(t, first)
		all(t, verdicts[50:], messaging.ErrRefused, 51)
		all(t, wait(t, second), messaging.ErrRefused, 50)
		mustPublish(t, p, texts(200, 1)...)
		noneLost(t, url, messages, verdicts)
	})

	t.Run("AMissingExchangeIsNoRefusal", func(t *testing.T) {
		t.Parallel()
		url, p := setUp(t)
		testenv.Management(t, url).DeleteExchange(exchange)
		wantUnknown(t, wait(t, publish(t, p, texts(0, 20)...)), 20)
		mustPublish(t, p, texts(0, 20)...)
	})

	t.Run("ADeletedQueueReturnsItsMessages", func(t *testing.T) {
		t.Parallel()
		url, p := setUp(t)
		testenv.Management(t, url).DeleteQueue(queue)
		all(t, wait(t, publish(t, p, texts(0, 20)...)), messaging.ErrReturned, 20)
	})
}

func TestPublishWhenTheConnectionFails(t *testing.T) {
	t.Parallel()
	const confirmTimeout = time.Second // enough for confirms in normal operation, even on a busy machine

	t.Run("ACutBeforeThePageArrivesIsUnknown", func(t *testing.T) {
		t.Parallel()
		proxy, p := proxied(t, 0)
		proxy.Freeze(true)
		first, second := publish(t, p, texts(0, 100)...), publish(t, p, texts(100, 100)...)
		if proxy.Cut() == 0 {
			t.Fatal("no connection to cut")
		}
		proxy.Freeze(false)
		wantUnknown(t, wait(t, first), 100)
		wantUnknown(t, wait(t, second), 100)
		mustPublish(t, p, texts(0, 100)...)
	})

	t.Run("ACutDuringThePageReportsOnlyStoredMessages", func(t *testing.T) {
		t.Parallel()
		url := testenv.AMQP(t)
		proxy, through := testenv.ProxyURL(t, url)
		p := newPublisher(t, PublisherConfig{URL: through, Topology: topology})
		var messages []messaging.Message
		var verdicts []error
		for round := range 10 {
			mustPublish(t, p)
			page := texts(round*500, 500)
			receipt := publish(t, p, page...)
			proxy.Cut()
			messages, verdicts = append(messages, page...), append(verdicts, wait(t, receipt)...)
		}
		for i, verdict := range verdicts {
			if verdict != nil && !errors.Is(verdict, messaging.ErrUnknown) {
				t.Fatalf("verdict %d is %v", i, verdict)
			}
		}
		noneLost(t, url, messages, verdicts)
	})

	t.Run("APageDoesNotOvertakeALostPage", func(t *testing.T) {
		t.Parallel()
		proxy, p := proxied(t, 0)
		proxy.Freeze(true)
		first := publish(t, p, texts(0, 10)...)
		ended := p.link.channel.NotifyClose(make(chan *amqp.Error, 1))
		proxy.Cut()
		proxy.Freeze(false)
		receive(t, ended)
		second := publish(t, p, texts(10, 10)...)
		wantUnknown(t, wait(t, first), 10)
		wantUnknown(t, wait(t, second), 10)
	})

	t.Run("ALossWithNothingInFlightGoesUnnoticed", func(t *testing.T) {
		t.Parallel()
		proxy, p := proxied(t, 0)
		ended := p.link.channel.NotifyClose(make(chan *amqp.Error, 1))
		proxy.Cut()
		receive(t, ended)
		mustPublish(t, p, texts(0, 10)...)
	})

	t.Run("ABlackHoleEndsAtTheConfirmTimeout", func(t *testing.T) {
		t.Parallel()
		proxy, p := proxied(t, confirmTimeout)
		proxy.Freeze(true)
		receipt, started := publish(t, p, texts(0, 10)...), time.Now()
		wantUnknown(t, wait(t, receipt), 10)
		if took := time.Since(started); took < confirmTimeout || took > 10*time.Second {
			t.Errorf("took %s", took)
		}
		proxy.Freeze(false)
		mustPublish(t, p, texts(0, 10)...)
	})

	t.Run("InterruptedWaitsDoNotExtendTheConfirmTimeout", func(t *testing.T) {
		t.Parallel()
		proxy, p := proxied(t, confirmTimeout)
		proxy.Freeze(true)
		receipt, started := publish(t, p, texts(0, 10)...), time.Now()
		for {
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
			verdicts := receipt.Wait(ctx)
			cancel()
			if !errors.Is(verdicts[0], context.DeadlineExceeded) {
				wantUnknown(t, verdicts, 10)
				break
			}
			if time.Since(started) > 10*time.Second {
				t.Fatal("still waiting after 10 s")
			}
		}
		wantUnknown(t, wait(t, receipt), 10) // another call returns at once
	})

	t.Run("ConnectingToABlackHoleEndsWithTheContext", func(t *testing.T) {
		t.Parallel()
		proxy, through := testenv.ProxyURL(t, testenv.AMQP(t))
		proxy.Freeze(true)
		p := newPublisher(t, PublisherConfig{URL: through, Topology: topology})
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		defer cancel()
		started := time.Now()
		if _, err := p.Publish(ctx, texts(0, 1)); err == nil {
			t.Error("published into a black hole")
		}
		if took := time.Since(started); took > 3*time.Second {
			t.Errorf("took %s", took)
		}
		proxy.Freeze(false)
		mustPublish(t, p, texts(0, 1)...)
	})
}

func TestCloseWithAThousandUnconfirmed(t *testing.T) {
	t.Parallel()
	url := testenv.AMQP(t)
	p := newPublisher(t, PublisherConfig{URL: url})
	for range 20 {
		publish(t, p, texts(0, 500)...)
		receipt := publish(t, p, texts(500, 500)...)
		if err := p.Close(); err != nil {
			t.Fatal(err)
		}
		if got := len(wait(t, receipt)); got != 500 {
			t.Fatalf("%d verdicts, want 500", got)
		}
	}
}

// proxied returns a publisher that is connected through a proxy.
func proxied(t *testing.T, confirmTimeout time.Duration) (*testenv.TCPProxy, *Publisher) {
	t.Helper()
	proxy, through := testenv.ProxyURL(t, testenv.AMQP(t))
	p := newPublisher(t, PublisherConfig{URL: through, ConfirmTimeout: confirmTimeout})
	mustPublish(t, p)
	return proxy, p
}
