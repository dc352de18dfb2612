package rabbit

import (
	"context"
	"hash/fnv"
	"log/slog"
	"time"

	"example.com/orders/internal/failpoint"
	"example.com/orders/internal/messaging"
	"github.com/cenkalti/backoff/v5"
	amqp "github.com/rabbitmq/amqp091-go"
)

// lane handles deliveries in batches, one after the other, until its channel is closed or ctx is done.
func (c *Consumer) lane(ctx context.Context, source <-chan amqp.Delivery) {
	for ctx.Err() == nil {
		batch := c.collect(source)
		if len(batch) == 0 {
			return
		}
		if !c.handleUntilDone(ctx, batch) {
			return
		}
		failpoint.Hit("consumer.applied")
		if err := c.ack(batch); err != nil {
			// The connection is gone. All copies that come again are duplicates to the inbox.
			slog.WarnContext(ctx, "ack failed, deliveries will come again", "queue", c.config.Queue, "deliveries", len(batch), "error", err)
			return
		}
	}
}

// collect waits for a delivery and takes what else has come by then. It does not wait for more: while one batch is handled the next one
// gathers by itself, so batches grow with the load and a lone delivery is not held up.
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

// handleUntilDone hands the batch in until the handler takes it. It returns false if ctx ended first.
func (c *Consumer) handleUntilDone(ctx context.Context, batch []amqp.Delivery) bool {
	deliveries := make([]messaging.Delivery, len(batch))
	for i := range batch {
		deliveries[i] = decode(&batch[i])
	}
	pause := backoff.NewExponentialBackOff()
	pause.InitialInterval = 50 * time.Millisecond
	pause.MaxInterval = 5 * time.Second
	for {
		err := c.handle(ctx, deliveries)
		if err == nil {
			return true
		}
		if ctx.Err() != nil {
			return false
		}
		retryIn := pause.NextBackOff()
		slog.WarnContext(ctx, "consumer waits", "queue", c.config.Queue, "deliveries", len(batch), "error", err, "retry_in", retryIn)
		sleep(ctx, retryIn)
	}
}

// ack settles a batch. With one lane everything before its last delivery is done, and one frame says so.
func (c *Consumer) ack(batch []amqp.Delivery) error {
	if c.config.Lanes == 1 {
		return batch[len(batch)-1].Ack(true)
	}
	for i := range batch {
		if err := batch[i].Ack(false); err != nil {
			return err
		}
	}
	return nil
}

func hash(s string) uint32 {
	h := fnv.New32a()
	_, _ = h.Write([]byte(s)) // never fails
	return h.Sum32()
}
