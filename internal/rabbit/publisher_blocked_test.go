package rabbit

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"example.com/shop/internal/dev/testenv"
)

func TestPublishDuringABrokerAlarm(t *testing.T) {
	t.Parallel()
	const confirmTimeout = time.Second // enough for confirms in normal operation, even on a busy machine

	// setUp raises the alarm on a connected publisher.
	setUp := func(t *testing.T) (p *Publisher, lower func()) {
		t.Helper()
		alarm, through := newAlarm(t, testenv.AMQP(t))
		p = newPublisher(t, PublisherConfig{URL: through, ConfirmTimeout: confirmTimeout})
		mustPublish(t, p)
		lower = alarm.raise()
		t.Cleanup(lower)
		return p, lower
	}
	// waitBlocked waits for four confirm timeouts, and fails the test unless the context ended the wait.
	waitBlocked := func(t *testing.T, receipt interface{ Wait(context.Context) []error }, n int) {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), 4*confirmTimeout)
		defer cancel()
		all(t, receipt.Wait(ctx), context.DeadlineExceeded, n)
	}

	t.Run("TheConfirmTimerStops", func(t *testing.T) {
		t.Parallel()
		p, lower := setUp(t)
		receipt := publish(t, p, texts(0, 10)...)
		waitBlocked(t, receipt, 10)
		lower()
		all(t, wait(t, receipt), nil, 10)
		mustPublish(t, p, texts(10, 10)...)
	})

	t.Run("TheConfirmTimerRunsAgainAfterwards", func(t *testing.T) {
		t.Parallel()
		alarm, through := newAlarm(t, testenv.AMQP(t))
		p := newPublisher(t, PublisherConfig{URL: through, ConfirmTimeout: confirmTimeout})
		mustPublish(t, p)
		t.Cleanup(alarm.raise())
		receipt := publish(t, p, texts(0, 10)...)
		waitBlocked(t, receipt, 10)
		alarm.send(unblockedFrame) // the proxy still forwards nothing
		started := time.Now()
		verdicts := wait(t, receipt)
		wantUnknown(t, verdicts, 10)
		if took := time.Since(started); took < confirmTimeout {
			t.Errorf("gave up after %s", took)
		}
		if errors.Is(verdicts[0], context.DeadlineExceeded) {
			t.Errorf("got %v, want the confirm timeout", verdicts[0])
		}
	})

	t.Run("CloseReturnsDespiteHeartbeats", func(t *testing.T) {
		t.Parallel()
		p, _ := setUp(t)
		publish(t, p, texts(0, 10)...)
		mustCloseSoon(t, p)
	})

	t.Run("CloseReturnsDespiteAHangingWrite", func(t *testing.T) {
		t.Parallel()
		p, _ := setUp(t)
		large := texts(0, 60)
		for i := range large { // exceeds the socket buffers
			large[i] = text("", strings.Repeat("x", 400<<10))
		}
		receipt := publish(t, p, large...)
		waitBlocked(t, receipt, 60)
		select {
		case <-p.link.writing:
			t.Fatal("the write does not hang")
		default:
		}
		mustCloseSoon(t, p)
		wantUnknown(t, wait(t, receipt), 60)
	})
}

func mustCloseSoon(t *testing.T, p *Publisher) {
	t.Helper()
	started := time.Now()
	if err := p.Close(); err != nil {
		t.Error(err)
	}
	if took := time.Since(started); took > closeTimeout+time.Second {
		t.Errorf("took %s", took)
	}
}
