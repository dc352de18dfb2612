package rabbit

import (
	"context"
	"fmt"
	"sync"

	amqp "github.com/rabbitmq/amqp091-go"
)

// Gauge reads queue depths and checks that the broker responds. It keeps its connection between calls. It is safe for
// concurrent use.
type Gauge struct {
	url, name string

	mu   sync.Mutex
	conn *Connection
}

// Depth is the state of a queue as a passive declaration shows it.
type Depth struct {
	Queue string
	// Missing means that the queue does not exist.
	Missing bool
	// Ready is the number of messages that are not delivered to any consumer.
	Ready int64
	// Consumers is the number of consumers, including those on standby.
	Consumers int
}

// NewGauge makes a Gauge. It does not connect.
func NewGauge(url, name string) *Gauge { return &Gauge{url: url, name: name} }

// Read returns the depth of each queue, in the given order. After an error the next call reconnects.
func (g *Gauge) Read(ctx context.Context, queues []string) (depths []Depth, err error) {
	err = g.ask(ctx, func() error {
		depths, err = g.read(queues)
		return err
	})
	return depths, err
}

// Check returns nil if the broker answers. It needs no permission for anything in the vhost.
func (g *Gauge) Check(ctx context.Context) error {
	return g.ask(ctx, func() error {
		channel, err := g.conn.Channel()
		if err != nil {
			return fmt.Errorf("open channel: %w", err)
		}
		return channel.Close()
	})
}

// ask calls fn with a connection, and closes the connection if fn fails or ctx ends.
func (g *Gauge) ask(ctx context.Context, fn func() error) (err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.conn == nil || g.conn.IsClosed() {
		g.hangUp()
		if g.conn, err = Dial(ctx, g.url, g.name); err != nil {
			return err
		}
	}
	stop := context.AfterFunc(ctx, g.conn.Cut)
	err = fn()
	if !stop() {
		err = ctx.Err()
	}
	if err != nil {
		g.hangUp()
	}
	return err
}

func (g *Gauge) read(queues []string) (depths []Depth, err error) {
	var channel *amqp.Channel
	for _, name := range queues {
		if channel == nil {
			if channel, err = g.conn.Channel(); err != nil {
				return nil, fmt.Errorf("open channel: %w", err)
			}
		}
		found, err := channel.QueueDeclarePassive(name, true, false, false, false, nil)
		switch {
		case refused(err, amqp.NotFound): // the refusal has closed the channel
			channel = nil
			depths = append(depths, Depth{Queue: name, Missing: true})
			continue
		case err != nil:
			return nil, fmt.Errorf("check queue %s: %w", name, brokenOr(name, err))
		}
		depths = append(depths, Depth{Queue: name, Ready: int64(found.Messages), Consumers: found.Consumers})
	}
	if channel != nil {
		return depths, channel.Close()
	}
	return depths, nil
}

// Close ends the connection.
func (g *Gauge) Close() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.hangUp()
}

func (g *Gauge) hangUp() {
	if g.conn != nil {
		g.conn.HangUp()
		g.conn = nil
	}
}
