package rabbit

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"

	"example.com/shop/internal/messaging"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

func TestConsume(t *testing.T) {
	t.Parallel()

	t.Run("RetriesABatchUntilItIsHandled", func(t *testing.T) {
		t.Parallel()
		url, p := setUp(t)
		mustPublish(t, p, texts(0, 5)...)
		calls := make(chan []string)
		var failures atomic.Int32
		failures.Store(2)
		config := ConsumerConfig{URL: url, Batch: 2}
		consumer := consume(t, config, func(ctx context.Context, deliveries []messaging.Delivery) error {
			err := ctx.Err()
			if failures.Add(-1) >= 0 {
				err = errHandler
			}
			select {
			case calls <- valuesOf(t, deliveries):
			case <-t.Context().Done():
			}
			return err
		})
		first := receive(t, calls)
		for range 2 {
			if diff := cmp.Diff(first, receive(t, calls)); diff != "" {
				t.Errorf("another batch before the first was handled: %s", diff)
			}
		}
		got := first
		for len(got) < 5 {
			got = append(got, receive(t, calls)...)
		}
		consumer.stop()
		if diff := cmp.Diff([]string{"0", "1", "2", "3", "4"}, got); diff != "" {
			t.Error(diff)
		}
		if left := take(t, url, queue); len(left) > 0 {
			t.Errorf("%d messages left", len(left))
		}
	})

	t.Run("BatchesGrowUpToTheLimit", func(t *testing.T) {
		t.Parallel()
		url, p := setUp(t)
		mustPublish(t, p, texts(0, 200)...)
		sizes := make(chan int, 200)
		release := make(chan struct{})
		consume(t, ConsumerConfig{URL: url, Batch: 7},
			func(ctx context.Context, deliveries []messaging.Delivery) error {
				sizes <- len(deliveries)
				select {
				case <-release:
					return nil
				case <-ctx.Done():
					return ctx.Err()
				}
			})
		total, largest := receive(t, sizes), 0
		ready(t, url, 0) // all other deliveries accumulate behind the first batch
		close(release)
		for total < 200 {
			size := receive(t, sizes)
			total, largest = total+size, max(largest, size)
		}
		if total != 200 || largest != 7 {
			t.Errorf("%d deliveries in batches of up to %d, want 200 and 7", total, largest)
		}
	})

	t.Run("LanesKeepTheOrderOfEachKey", func(t *testing.T) {
		t.Parallel()
		url, p := setUp(t)
		const keys, each = 10, 50
		var messages []messaging.Message
		for i := range keys * each {
			messages = append(messages, text(fmt.Sprint("key-", i%keys), fmt.Sprint(i/keys)))
		}
		mustPublish(t, p, messages...)
		var busy, most atomic.Int32
		batches := make(chan []messaging.Delivery, keys*each)
		config := ConsumerConfig{URL: url, Batch: 5, Lanes: 4}
		consume(t, config, func(_ context.Context, deliveries []messaging.Delivery) error {
			now := busy.Add(1)
			defer busy.Add(-1)
			for seen := most.Load(); now > seen && !most.CompareAndSwap(seen, now); seen = most.Load() {
			}
			// Sent before the batch ends, so that a concurrent batch of the same lane would interleave.
			batches <- deliveries
			return nil
		})
		next := map[string]int{}
		for seen := 0; seen < keys*each; {
			for _, delivery := range receive(t, batches) {
				if got := textOf(t, delivery.Payload); got != fmt.Sprint(next[delivery.Key]) {
					t.Fatalf("%s: got %s, want %d", delivery.Key, got, next[delivery.Key])
				}
				next[delivery.Key]++
				seen++
			}
		}
		if most.Load() > 4 {
			t.Errorf("%d concurrent batches in 4 lanes", most.Load())
		}
	})

	t.Run("OtherKeysContinueWhileOneLaneHangs", func(t *testing.T) {
		t.Parallel()
		url, p := setUp(t)
		stuck, free := keysOfTwoLanes(t)
		mustPublish(t, p, text(stuck, "0"), text(free, "1"), text(stuck, "2"), text(free, "3"), text(stuck, "4"))
		release, begun := make(chan struct{}), make(chan string, 5)
		// The last message of the free lane arrives only after its predecessor is acked, although an earlier delivery is not.
		config := ConsumerConfig{URL: url, Prefetch: 3, Batch: 1, Lanes: 2}
		consume(t, config, func(ctx context.Context, deliveries []messaging.Delivery) error {
			begun <- textOf(t, deliveries[0].Payload)
			if deliveries[0].Key == stuck {
				select {
				case <-release:
				case <-ctx.Done():
					return ctx.Err()
				}
			}
			return nil
		})
		got := map[string]bool{}
		for range 3 {
			got[receive(t, begun)] = true
		}
		if diff := cmp.Diff(map[string]bool{"0": true, "1": true, "3": true}, got); diff != "" {
			t.Error(diff)
		}
		close(release)
		for _, want := range []string{"2", "4"} {
			if got := receive(t, begun); got != want {
				t.Errorf("got %s, want %s", got, want)
			}
		}
	})

	t.Run("GetsMessagesPublishedBeforeItStarts", func(t *testing.T) {
		t.Parallel()
		url, p := setUp(t)
		message := text("the key", "the text")
		message.Headers = map[string]string{"traceparent": "00-1"}
		mustPublish(t, p, message)
		got := make(recorder, 10)
		consume(t, ConsumerConfig{URL: url}, got.handle)
		want := []messaging.Delivery{{
			ID: message.ID.String(), Type: message.Type, Key: message.Key,
			Payload: message.Payload, Headers: message.Headers,
		}}
		if diff := cmp.Diff(want, got.next(t, 1)); diff != "" {
			t.Error(diff)
		}
	})
}

// keysOfTwoLanes returns two keys that belong to different lanes.
func keysOfTwoLanes(t *testing.T) (a, b string) {
	t.Helper()
	for i := range 100 {
		if b := fmt.Sprint("key-", i); hash(b)%2 != hash("key")%2 {
			return "key", b
		}
	}
	t.Fatal("all keys belong to the same lane")
	return "", ""
}

func valuesOf(t *testing.T, deliveries []messaging.Delivery) []string {
	t.Helper()
	var values []string
	for _, delivery := range deliveries {
		values = append(values, textOf(t, delivery.Payload))
	}
	return values
}

// A consumer bounds the bytes of its unhandled deliveries, whatever the prefetch allows.
func TestDeliveriesAreBoundedInBytes(t *testing.T) {
	t.Parallel()
	url, p := setUp(t)
	const size, most, n = 10 << 10, 50 << 10, 100
	for i := range n {
		value := strconv.Itoa(1000+i) + strings.Repeat("x", size)
		mustPublish(t, p, messaging.New("", wrapperspb.String(value)))
	}
	batches, first := make(chan int, n), make(chan struct{})
	consume(t, ConsumerConfig{URL: url, MaxBytes: most}, func(_ context.Context, batch []messaging.Delivery) error {
		<-first
		batches <- len(batch)
		return nil
	})
	ready(t, url, 0) // the broker has delivered all messages
	close(first)
	for handled := 0; handled < n; {
		batch := receive(t, batches)
		if handled += batch; batch > most/size+2 {
			t.Errorf("a batch has %d deliveries of %d bytes, want at most %d", batch, size, most/size+2)
		}
	}
}
