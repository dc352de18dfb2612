package rabbit

import (
	"context"
	"fmt"
	"sync"

	amqp "github.com/rabbitmq/amqp091-go"
)

// Gauge reads how full queues are, and whether the broker answers at all, over a connection that it keeps from one reading to the next. It may be
// used by several goroutines.
type Gauge struct {
	url, name string

	mu   sync.Mutex
	conn *Connection
}

// Depth is a queue as the broker shows it to anybody.
type Depth struct {
	Queue string
	// Missing: there is no such queue.
	Missing bool
	// Ready are the messages that no consumer has.
	Ready int64
	// Consumers are those that take from it, the ones that stand by included.
	Consumers int
}

// NewGauge makes a Gauge. It does not connect.
func NewGauge(url, name string) *Gauge { return &Gauge{url: url, name: name} }

// Read returns the depth of each queue, in their order, or an error if the broker does not say; the next call connects anew then.
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

// ask calls fn with a connection, which is given up if fn fails or ctx ends.
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
		case refused(err, amqp.NotFound): // which has closed the channel
			channel = nil
			depths = append(depths, Depth{Queue: name, Missing: true})
			continue
		case err != nil:
			return nil, fmt.Errorf("look at queue %s: %w", name, brokenOr(name, err))
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
