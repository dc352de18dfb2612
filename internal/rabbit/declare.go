package rabbit

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
)

// ErrQueueBroken means that the broker answers INTERNAL_ERROR for a queue. While a quorum queue is being made that
// passes. If it does not, the queue has a name and no members that work, and somebody has to delete it or to restart
// the broker.
var ErrQueueBroken = errors.New("the broker answers INTERNAL_ERROR")

const (
	// declarePatience is how long one process waits for another that is declaring. Its connection is cut then, and it
	// tries again.
	declarePatience = 30 * time.Second
	// declarePause is the longest pause between two looks at what the other has done.
	declarePause = 250 * time.Millisecond
	// declareTries is how often Declare connects and declares while the broker answers INTERNAL_ERROR.
	declareTries = 5
)

// ensure makes sure that the topology is there. If something is missing, one process at a time declares, and the others
// wait: RabbitMQ records a quorum queue before it starts the members, so a second declaration meanwhile finds a queue
// that does not work yet.
func (t Topology) ensure(ctx context.Context, conn *Connection) error {
	if t.Given {
		return onChannel(conn, t.expect)
	}
	for began := time.Now(); ; {
		complete, err := t.isComplete(conn)
		if err != nil {
			return err
		}
		if complete { // so this starts nothing: it compares the arguments, and binds to new types
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
		if time.Since(began) > declarePatience {
			return fmt.Errorf("another process has been declaring the topology for %s", declarePatience)
		}
		if sleep(ctx, declarePause/5+rand.N(declarePause*4/5)); ctx.Err() != nil {
			return ctx.Err()
		}
	}
}

// isComplete tells whether exchange and queues exist.
func (t Topology) isComplete(conn *Connection) (bool, error) {
	err := onChannel(conn, t.expect)
	if refused(err, amqp.NotFound) {
		return false, nil
	}
	return err == nil, err
}

// lock makes sure that nobody else declares this topology, until unlock is called or the connection ends: an exclusive
// queue is one connection's. A user who may configure nothing but the topology goes without.
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
		_, _ = channel.QueueDelete(name, false, false, false) // fails only if the connection is gone, and the lock with it
		_ = channel.Close()
	}, err
}

// onChannel runs do on a channel of its own, since a refusal closes it.
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

// refused tells whether the broker refused something with a code of AMQP.
func refused(err error, code int) bool {
	var refusal *amqp.Error
	return errors.As(err, &refusal) && refusal.Code == code
}

// Declare makes the topology, for processes that may not. It tries a few times while the broker answers INTERNAL_ERROR.
func (t Topology) Declare(ctx context.Context, url string) (err error) {
	for try := range declareTries {
		if try > 0 {
			sleep(ctx, time.Duration(try)*declarePause+rand.N(declarePause))
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
		const cure = "empty and delete it, or give this one another name"
		return fmt.Errorf("queue %s exists with other arguments; %s: %w", name, cure, err)
	case err != nil:
		return fmt.Errorf("declare queue %s: %w", name, brokenOr(name, err))
	}
	return nil
}

// brokenOr returns err, as ErrQueueBroken if the broker's answer about the queue is INTERNAL_ERROR.
func brokenOr(name string, err error) error {
	if refused(err, amqp.InternalError) && !errors.Is(err, ErrQueueBroken) {
		return fmt.Errorf("queue %s: %w: %w", name, ErrQueueBroken, err)
	}
	return err
}
