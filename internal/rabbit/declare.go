package rabbit

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
)

// ErrQueueBroken means that the broker answers INTERNAL_ERROR for a queue. This is temporary while a quorum queue is
// being created. If it persists, the queue has a name but no working members, and an operator must delete the queue or
// restart the broker.
var ErrQueueBroken = errors.New("the broker answers INTERNAL_ERROR")

const (
	// declareTimeout is how long one process waits for another that is declaring. Then it gives up its connection and
	// tries again.
	declareTimeout = 30 * time.Second
	// declarePause is the longest pause between two checks of the other process's progress.
	declarePause = 250 * time.Millisecond
	// declareAttempts is how often Declare connects and declares while the broker answers INTERNAL_ERROR.
	declareAttempts = 5
)

// ensure makes sure that the topology exists. If something is missing, one process at a time declares it, and the
// others wait: RabbitMQ records a quorum queue before it starts the members, so a concurrent declaration would find a
// queue that does not work yet.
func (t Topology) ensure(ctx context.Context, conn *Connection) error {
	if t.Given {
		return onChannel(conn, t.expect)
	}
	for began := time.Now(); ; {
		complete, err := t.isComplete(conn)
		if err != nil {
			return err
		}
		if complete { // declaring then creates no queue: it compares the arguments and binds to new types
			return onChannel(conn, t.declare)
		}
		unlock, err := t.lock(conn)
		if err == nil {
			defer unlock()
			return onChannel(conn, t.declare)
		}
		if !refused(err, amqp.ResourceLocked) {
			return fmt.Errorf("lock the topology: %w", err)
		}
		if time.Since(began) > declareTimeout {
			return fmt.Errorf("another process has been declaring the topology for %s", declareTimeout)
		}
		if sleep(ctx, declarePause/5+rand.N(declarePause*4/5)); ctx.Err() != nil {
			return ctx.Err()
		}
	}
}

// isComplete reports whether the exchange and all queues exist.
func (t Topology) isComplete(conn *Connection) (bool, error) {
	err := onChannel(conn, t.expect)
	if refused(err, amqp.NotFound) {
		return false, nil
	}
	return err == nil, err
}

// lock prevents other processes from declaring this topology until unlock is called or the connection ends. The lock is
// an exclusive queue, which belongs to one connection. A user who may configure nothing but the topology proceeds
// without a lock.
func (t Topology) lock(conn *Connection) (unlock func(), err error) {
	name := t.Exchange + ".declaring"
	channel, err := conn.Channel()
	if err != nil {
		return nil, err
	}
	_, err = channel.QueueDeclare(name, false, false, true, false, amqp.Table{"x-queue-type": "classic"})
	if refused(err, amqp.AccessRefused) {
		return func() {}, nil
	}
	return func() {
		_, _ = channel.QueueDelete(name, false, false, false) // fails only if the connection and thus the lock are gone
		_ = channel.Close()
	}, err
}

// onChannel runs do on a separate channel, because a refusal closes the channel.
func onChannel(conn *Connection, do func(*amqp.Channel) error) error {
	channel, err := conn.Channel()
	if err != nil {
		return fmt.Errorf("open channel: %w", err)
	}
	if err := do(channel); err != nil {
		return err
	}
	return channel.Close()
}

// refused reports whether err is a refusal by the broker with this AMQP code.
func refused(err error, code int) bool {
	var refusal *amqp.Error
	return errors.As(err, &refusal) && refusal.Code == code
}

// Declare declares the topology on behalf of processes that lack the permission. It retries a few times while the
// broker answers INTERNAL_ERROR.
func (t Topology) Declare(ctx context.Context, url string) (err error) {
	for attempt := range declareAttempts {
		if attempt > 0 {
			sleep(ctx, time.Duration(attempt)*declarePause+rand.N(declarePause))
		}
		if err = t.declareOnce(ctx, url); !errors.Is(err, ErrQueueBroken) || ctx.Err() != nil {
			break
		}
	}
	return err
}

func (t Topology) declareOnce(ctx context.Context, url string) error {
	conn, err := Dial(ctx, url, "topology")
	if err != nil {
		return err
	}
	defer conn.HangUp()
	stop := context.AfterFunc(ctx, conn.Cut)
	defer stop()
	return t.ensure(ctx, conn)
}

func declareQueue(ch *amqp.Channel, name string, arguments amqp.Table) error {
	_, err := ch.QueueDeclare(name, true, false, false, false, arguments)
	switch {
	case refused(err, amqp.PreconditionFailed):
		const cure = "empty and delete it, or use another name"
		return fmt.Errorf("queue %s exists with other arguments; %s: %w", name, cure, err)
	case err != nil:
		return fmt.Errorf("declare queue %s: %w", name, brokenOr(name, err))
	}
	return nil
}

// brokenOr returns err, wrapped in ErrQueueBroken if the broker answered INTERNAL_ERROR for the queue.
func brokenOr(name string, err error) error {
	if refused(err, amqp.InternalError) && !errors.Is(err, ErrQueueBroken) {
		return fmt.Errorf("queue %s: %w: %w", name, ErrQueueBroken, err)
	}
	return err
}
