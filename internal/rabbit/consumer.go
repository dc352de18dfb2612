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

// Handler settles a batch of deliveries for good: nil means that each is applied, was a duplicate, or is kept elsewhere, and that
// the broker may forget them. An error means that nothing could be decided, as when the database is away: the batch is handed in again,
// and meanwhile nothing else is taken.
type Handler func(ctx context.Context, deliveries []messaging.Delivery) error

// ConsumerConfig sets up a Consumer.
type ConsumerConfig struct {
	URL      string
	Topology Topology
	// Queue is the name of the queue to consume.
	Queue string
	// Name is the connection's name in the broker's eyes.
	Name string
	// Prefetch is the most deliveries that the broker hands out without an ack. Default 300: fewer starve the batches, more gain nothing.
	Prefetch int
	// MaxBytes is how many bytes of deliveries may be here and not handled before nothing more is read. Default 32 MiB.
	// One message more may be under way, of the broker's max_message_size at worst.
	MaxBytes int64
	// Batch is the most deliveries of one call of the handler. Default 100.
	Batch int
	// Lanes is how many batches are handled at once. Deliveries of one key share a lane, so their order holds. Default 1.
	Lanes int
	// Unordered says that the queue is: each delivery is handled by itself and as soon as it comes, so Prefetch is how many at once at most. Batch and Lanes
	// mean nothing then.
	Unordered bool
	// DrainTimeout bounds how long Run, once its context is done, still works on what it has. Default 10 s.
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

// Run consumes until ctx is done, then finishes what was delivered and acks it. It reconnects after every failure, and never fails itself.
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

// consume takes deliveries over one connection until that ends or ctx is done.
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

// subscribe starts the deliveries.
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

// sleep waits, or returns early when ctx is done.
func sleep(ctx context.Context, d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
	case <-timer.C:
	}
}
