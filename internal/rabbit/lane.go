package rabbit

import (
	"context"
	"hash/fnv"
	"log/slog"
	"sync"
	"time"

	"example.com/shop/internal/dev/failpoint"
	"example.com/shop/internal/messaging"
	"github.com/cenkalti/backoff/v5"
	amqp "github.com/rabbitmq/amqp091-go"
)

// lanes are the goroutines that handle the deliveries of one connection.
type lanes struct {
	sources []chan amqp.Delivery
	handled chan []amqp.Delivery // batches to ack
	running sync.WaitGroup
}

// startLanes starts lanes that work until ctx ends, or until wait is called and nothing is left to do.
func (c *Consumer) startLanes(ctx context.Context) *lanes {
	l := &lanes{handled: make(chan []amqp.Delivery, c.config.Lanes)}
	if c.config.Unordered {
		return l
	}
	l.sources = make([]chan amqp.Delivery, c.config.Lanes)
	for i := range l.sources {
		// Room for everything that may be unacked, so that a slow lane never blocks the others.
		l.sources[i] = make(chan amqp.Delivery, c.config.Prefetch)
		l.running.Go(func() { c.lane(ctx, l.sources[i], l.handled) })
	}
	return l
}

// hand passes a delivery to the lane of its key or, in an unordered queue, to a new goroutine. The prefetch bounds
// their number.
func (c *Consumer) hand(ctx context.Context, l *lanes, delivery amqp.Delivery) {
	if !c.config.Unordered {
		l.sources[c.laneOf(&delivery)] <- delivery
		return
	}
	l.running.Go(func() { c.settle(ctx, []amqp.Delivery{delivery}, l.handled) })
}

// wait waits until the lanes have ended.
func (l *lanes) wait() {
	for _, source := range l.sources {
		close(source)
	}
	l.running.Wait()
}

// lane handles deliveries in batches, one after the other, until its source is closed or ctx is done.
func (c *Consumer) lane(ctx context.Context, source <-chan amqp.Delivery, handled chan<- []amqp.Delivery) {
	for ctx.Err() == nil {
		batch := c.collect(source)
		if len(batch) == 0 {
			return
		}
		c.settle(ctx, batch, handled)
	}
}

// settle handles a batch and passes it on for acking, unless ctx ends first.
func (c *Consumer) settle(ctx context.Context, batch []amqp.Delivery, handled chan<- []amqp.Delivery) {
	if !c.handleUntilDone(ctx, batch) {
		return
	}
	failpoint.Hit("consumer.applied")
	select {
	case handled <- batch:
	case <-ctx.Done():
	}
}

// collect waits for a delivery and adds those that have already arrived. It does not wait for more: the next batch
// accumulates while this one is handled, so batches grow with the load and a single delivery is not delayed.
func (c *Consumer) collect(source <-chan amqp.Delivery) []amqp.Delivery {
	first, open := <-source
	if !open {
		return nil
	}
	batch := []amqp.Delivery{first}
	for len(batch) < c.config.Batch {
		select {
		case delivery, open := <-source:
			if !open {
				return batch
			}
			batch = append(batch, delivery)
		default:
			return batch
		}
	}
	return batch
}

// handleUntilDone calls the handler until it accepts the batch. It returns false if ctx ended first.
func (c *Consumer) handleUntilDone(ctx context.Context, batch []amqp.Delivery) bool {
	deliveries := make([]messaging.Delivery, len(batch))
	for i := range batch {
		deliveries[i] = decode(&batch[i])
	}
	pause := backoff.NewExponentialBackOff()
	pause.InitialInterval = 50 * time.Millisecond
	pause.MaxInterval = 5 * time.Second
	for paused := false; ; {
		err := c.handle(ctx, deliveries)
		if err == nil || ctx.Err() != nil {
			if paused {
				c.meters.change(c.meters.paused, false)
			}
			return err == nil
		}
		if !paused {
			paused = true
			c.meters.change(c.meters.paused, true)
		}
		retryIn := pause.NextBackOff()
		slog.WarnContext(ctx, "consumer paused",
			"queue", c.config.Queue, "deliveries", len(batch), "error", err, "retry_in", retryIn)
		sleep(ctx, retryIn)
	}
}

func hash(s string) uint32 {
	h := fnv.New32a()
	_, _ = h.Write([]byte(s)) // never fails
	return h.Sum32()
}
