package rabbit

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"time"

	"example.com/shop/internal/messaging"
	"github.com/cenkalti/backoff/v5"
	amqp "github.com/rabbitmq/amqp091-go"
	"go.opentelemetry.io/otel/metric"
)

// Handler settles a batch of deliveries. Nil means that each delivery was applied, was a duplicate, or is stored
// elsewhere, and that the broker may delete them. An error means that nothing could be decided, for example because the
// database is unavailable: the Consumer calls the handler again with the same batch, and its lane handles nothing else
// in the meantime.
type Handler func(ctx context.Context, deliveries []messaging.Delivery) error

// ConsumerConfig sets up a Consumer.
type ConsumerConfig struct {
	URL      string
	Topology Topology
	// Queue is the name of the queue to consume.
	Queue string
	// Name is the connection name that the broker shows.
	Name string
	// Prefetch is the largest number of unacked deliveries. Default 300: fewer would starve the batches, more gain
	// nothing.
	Prefetch int
	// MaxBytes bounds the deliveries that were received and not handled. Beyond it nothing more is read. Default 32 MiB.
	// One more message may arrive, in the worst case of the broker's max_message_size.
	MaxBytes int64
	// Batch is the largest number of deliveries in one call of the handler. Default 100.
	Batch int
	// Lanes is the number of batches handled concurrently. Deliveries of one key share a lane, which preserves their
	// order. Default 1.
	Lanes int
	// Unordered must match the queue. Each delivery is then handled on its own as soon as it arrives, at most Prefetch of
	// them concurrently. Batch and Lanes have no effect.
	Unordered bool
	// DrainTimeout bounds how long Run keeps handling received deliveries after its context is done. Default 10 s.
	DrainTimeout time.Duration
	// MeterProvider takes the metrics. Default: the global one.
	MeterProvider metric.MeterProvider
}

// Consumer feeds one queue to a Handler.
type Consumer struct {
	config ConsumerConfig
	handle Handler
	meters meters
}

// NewConsumer makes a Consumer. It does not connect.
func NewConsumer(config ConsumerConfig, handle Handler) *Consumer {
	config.Prefetch = cmp.Or(config.Prefetch, 300)
	config.MaxBytes = cmp.Or(config.MaxBytes, 32<<20)
	config.Batch = cmp.Or(config.Batch, 100)
	config.Lanes = cmp.Or(config.Lanes, 1)
	config.DrainTimeout = cmp.Or(config.DrainTimeout, 10*time.Second)
	return &Consumer{config: config, handle: handle, meters: newMeters(config.MeterProvider, config.Queue)}
}

// Run consumes until ctx is done, then handles and acks what was already delivered. It reconnects after every failure
// and always returns nil.
func (c *Consumer) Run(ctx context.Context) error {
	pause := backoff.NewExponentialBackOff()
	pause.InitialInterval = 100 * time.Millisecond
	pause.MaxInterval = 10 * time.Second
	for ctx.Err() == nil {
		started := time.Now()
		err := c.consume(ctx)
		if ctx.Err() != nil {
			return nil
		}
		if time.Since(started) > pause.MaxInterval {
			pause.Reset()
		}
		retryIn := pause.NextBackOff()
		slog.WarnContext(ctx, "consumer interrupted", "queue", c.config.Queue, "error", err, "retry_in", retryIn)
		sleep(ctx, retryIn)
	}
	return nil
}

// consume consumes over one connection until the connection ends or ctx is done.
func (c *Consumer) consume(ctx context.Context) error {
	conn, err := Dial(ctx, c.config.URL, c.config.Name)
	c.meters.connected(ctx, err)
	if err != nil {
		return err
	}
	defer conn.HangUp()
	conn.Hold(c.config.MaxBytes)
	stop := context.AfterFunc(ctx, conn.Cut)
	channel, source, err := c.subscribe(ctx, conn)
	if !stop() {
		return ctx.Err()
	}
	if err != nil {
		return err
	}
	c.meters.change(c.meters.consuming, true)
	defer c.meters.change(c.meters.consuming, false)
	closed := channel.NotifyClose(make(chan *amqp.Error, 1))
	if err := c.dispatch(ctx, conn, channel, source); err != nil {
		select {
		case reason := <-closed:
			if reason != nil {
				err = fmt.Errorf("%w: %w", err, reason)
			}
		default:
		}
		return err
	}
	return nil
}

const consumerTag = "group"

// subscribe opens a channel and starts the deliveries.
func (c *Consumer) subscribe(ctx context.Context, conn *Connection) (*amqp.Channel, <-chan amqp.Delivery, error) {
	if err := c.config.Topology.ensure(ctx, conn); err != nil {
		return nil, nil, err
	}
	channel, err := conn.Channel()
	if err != nil {
		return nil, nil, fmt.Errorf("open channel: %w", err)
	}
	if err := channel.Qos(c.config.Prefetch, 0, false); err != nil {
		return nil, nil, fmt.Errorf("set prefetch: %w", err)
	}
	source, err := channel.Consume(c.config.Queue, consumerTag, false, false, false, false, nil)
	if err != nil {
		return nil, nil, fmt.Errorf("consume %s: %w", c.config.Queue, brokenOr(c.config.Queue, err))
	}
	return channel, source, nil
}

// sleep waits for d, or until ctx is done.
func sleep(ctx context.Context, d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
	case <-timer.C:
	}
}
