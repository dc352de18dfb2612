package rabbit

import (
	"context"
	"sync"
	"sync/atomic"
	"testing"

	"example.com/shop/internal/dev/testenv"
	"example.com/shop/internal/messaging"
)

// All consumers of an unordered queue are active. Each handles up to its prefetch of deliveries concurrently, and a
// slow delivery delays no other.
func TestUnorderedQueueIsSharedAndParallel(t *testing.T) {
	t.Parallel()
	const prefetch, n = 3, 20
	const name = "shop.any"
	unordered := Topology{
		Exchange: topology.Exchange,
		Queues:   []Queue{{Name: name, Types: topology.Queues[0].Types, Unordered: true}},
	}
	url := testenv.AMQP(t)
	publisher := newPublisher(t, PublisherConfig{URL: url, Topology: unordered})
	mustPublish(t, publisher)

	release := make(chan struct{})
	var handled atomic.Int64
	var busy [2]atomic.Int64
	began := make(chan struct{}, n)
	ctx, stop := context.WithCancel(t.Context())
	var running sync.WaitGroup
	for i := range busy {
		config := ConsumerConfig{URL: url, Topology: unordered, Queue: name, Unordered: true, Prefetch: prefetch}
		consumer := NewConsumer(config, func(_ context.Context, deliveries []messaging.Delivery) error {
			if now := busy[i].Add(1); now > prefetch || len(deliveries) != 1 {
				t.Errorf("%d concurrent handlers, with %d deliveries", now, len(deliveries))
			}
			began <- struct{}{}
			if textOf(t, deliveries[0].Payload) == "0" {
				<-release // until all others are handled
			}
			busy[i].Add(-1)
			handled.Add(1)
			return nil
		})
		running.Go(func() { _ = consumer.Run(ctx) })
	}
	mustPublish(t, publisher, texts(0, n)...)
	for range n {
		receive(t, began)
	}
	close(release)
	stop()
	running.Wait()
	if left := take(t, url, name); len(left) > 0 || handled.Load() != n {
		t.Errorf("%d handled, %d left", handled.Load(), len(left))
	}
}
