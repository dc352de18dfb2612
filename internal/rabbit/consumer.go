package rabbit

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"example.com/orders/internal/messaging"
	"github.com/cenkalti/backoff/v5"
	amqp "github.com/rabbitmq/amqp091-go"
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
	// Batch is the most deliveries of one call of the handler. Default 100.
	Batch int
	// Lanes is how many batches are handled at once. Deliveries of one key share a lane, so their order holds. Default 1.
	Lanes int
	// DrainTimeout bounds how long Run, once its context is done, still works on what it has. Default 10 s.
	DrainTimeout time.Duration
}

// Consumer feeds one queue to a Handler.
type Consumer struct {
	config ConsumerConfig
	handle Handler
}

// NewConsumer makes a Consumer. It does not connect.
func NewConsumer(config ConsumerConfig, handle Handler) *Consumer {
	config.Prefetch = cmp.Or(config.Prefetch, 300)
	config.Batch = cmp.Or(config.Batch, 100)
	config.Lanes = cmp.Or(config.Lanes, 1)
	config.DrainTimeout = cmp.Or(config.DrainTimeout, 10*time.Second)
	return &Consumer{config: config, handle: handle}
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

var errDeliveriesEnded = errors.New("the broker ended the deliveries")

// consume takes deliveries over one connection until that ends or ctx is done.
func (c *Consumer) consume(ctx context.Context) error {
	conn, err := dial(ctx, c.config.URL, c.config.Name, nil)
	if err != nil {
		return err
	}
	defer hangUp(conn)
	channel, err := conn.Channel()
	if err != nil {
		return fmt.Errorf("open channel: %w", err)
	}
	if err := c.config.Topology.declare(channel); err != nil {
		return err
	}
	if err := channel.Qos(c.config.Prefetch, 0, false); err != nil {
		return fmt.Errorf("set prefetch: %w", err)
	}
	const tag = "group"
	source, err := channel.Consume(c.config.Queue, tag, false, false, false, false, nil)
	if err != nil {
		return fmt.Errorf("consume %s: %w", c.config.Queue, err)
	}
	// At the end of ctx the broker is told to send no more. What it has sent is worked off, and then source is closed: by the
	// library, which also does so when the queue is deleted, when the channel stays open.
	stop := context.AfterFunc(ctx, func() { _ = channel.Cancel(tag, false) })
	defer stop()
	c.dispatch(ctx, source)
	if ctx.Err() != nil {
		return nil
	}
	return errDeliveriesEnded
}

// dispatch hands deliveries to their lanes until source is closed, and waits for the lanes.
func (c *Consumer) dispatch(ctx context.Context, source <-chan amqp.Delivery) {
	// Handlers outlive ctx: a delivery that was begun is finished. They end with the drain timeout, or with this connection.
	work, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	stop := context.AfterFunc(ctx, func() { time.AfterFunc(c.config.DrainTimeout, cancel) })
	defer stop()

	lanes := make([]chan amqp.Delivery, c.config.Lanes)
	done := make(chan struct{})
	for i := range lanes {
		// Room for all that may be unacked, so that a slow lane never holds up the others.
		lanes[i] = make(chan amqp.Delivery, c.config.Prefetch)
		go func() {
			defer func() { done <- struct{}{} }()
			c.lane(work, lanes[i])
		}()
	}
	for delivery := range source {
		lanes[c.laneOf(&delivery)] <- delivery
	}
	if ctx.Err() == nil {
		cancel() // the connection is gone and with it the acks: what is not begun is delivered again
	}
	for _, lane := range lanes {
		close(lane)
	}
	for range lanes {
		<-done
	}
}

// laneOf keeps the deliveries of one key together, and spreads those without a key.
func (c *Consumer) laneOf(d *amqp.Delivery) int {
	if c.config.Lanes == 1 {
		return 0
	}
	key, _ := d.Headers[keyHeader].(string)
	return int(hash(cmp.Or(key, d.MessageId)) % uint32(c.config.Lanes))
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
