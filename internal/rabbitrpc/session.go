package rabbitrpc

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"example.com/shop/internal/rabbit"
	amqp "github.com/rabbitmq/amqp091-go"
)

// session is one connection and the calls in flight on it.
type session struct {
	*Server
	conn    *rabbit.Connection
	channel *amqp.Channel
	lost    <-chan *amqp.Error // receives the reason when the channel closes
	work    context.Context    // the context of the calls; it ends with the session
	cancel  context.CancelFunc
	answers chan answer
	written chan error // receives the writer's result
	feeds   sync.WaitGroup
	calls   sync.WaitGroup
}

// answer settles a request: the reply, if any, is sent, and then the request is acked.
type answer struct {
	request *amqp.Delivery
	reply   *amqp.Publishing
}

var (
	errDeliveriesEnded = errors.New("the broker stopped the deliveries")
	errLost            = errors.New("connection lost")
)

// session serves over one connection until the connection ends, or until ctx is done and everything is answered. If the
// connection is lost, its calls are canceled: they cannot be answered, and the broker redelivers their requests to
// another replica.
func (s *Server) session(ctx context.Context) error {
	conn, err := rabbit.Dial(ctx, s.config.URL, s.config.Name)
	if err != nil {
		return unlessDone(ctx, err)
	}
	defer conn.HangUp()
	conn.Hold(s.config.MaxBytes)
	current := &session{Server: s, conn: conn, answers: make(chan answer, s.config.Prefetch),
		written: make(chan error, 1)}
	current.work, current.cancel = context.WithCancel(context.WithoutCancel(ctx))
	defer current.cancel()
	stop := context.AfterFunc(ctx, conn.Cut)
	sources, err := current.subscribe()
	if !stop() || err != nil {
		return unlessDone(ctx, err)
	}
	ended := make(chan struct{}, len(sources))
	for name, source := range sources {
		current.feeds.Go(func() {
			current.feed(s.services[name], source)
			ended <- struct{}{}
		})
	}
	go func() { current.written <- current.write() }()
	select {
	case <-ctx.Done():
		return current.drain()
	case reason := <-current.lost:
		return current.abandon(errors.Join(errLost, asError(reason)))
	case err := <-current.written:
		current.written <- err
		return current.abandon(err)
	case <-ended: // a queue was deleted; channel and connection are still open
		return errors.Join(errDeliveriesEnded, current.drain())
	}
}

// abandon ends the session without answers.
func (s *session) abandon(reason error) error {
	s.cancel()
	s.conn.Cut()
	<-s.written
	return reason
}

func asError(reason *amqp.Error) error {
	if reason == nil {
		return nil
	}
	return reason
}

// unlessDone returns err, or nil if ctx is done. It is for a session that has not begun.
func unlessDone(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return nil
	}
	return err
}

// subscribe starts the deliveries of each service.
func (s *session) subscribe() (map[string]<-chan amqp.Delivery, error) {
	if err := declareExchange(s.conn, s.config.Exchange); err != nil {
		return nil, err
	}
	var err error
	if s.channel, err = s.conn.Channel(); err != nil {
		return nil, fmt.Errorf("open channel: %w", err)
	}
	s.lost = s.channel.NotifyClose(make(chan *amqp.Error, 1))
	if err := s.channel.Qos(s.config.Prefetch, 0, false); err != nil {
		return nil, fmt.Errorf("set prefetch: %w", err)
	}
	sources := map[string]<-chan amqp.Delivery{}
	for _, name := range slices.Sorted(maps.Keys(s.services)) {
		if _, err := s.channel.QueueDeclare(name, true, true, false, false, queueArguments); err != nil {
			return nil, fmt.Errorf("declare queue %s: %w", name, err)
		}
		if err := s.channel.QueueBind(name, name, s.config.Exchange, false, nil); err != nil {
			return nil, fmt.Errorf("bind queue %s: %w", name, err)
		}
		if sources[name], err = s.channel.Consume(name, name, false, false, false, false, nil); err != nil {
			return nil, fmt.Errorf("consume %s: %w", name, err)
		}
	}
	return sources, nil
}

// feed starts the calls of a service as slots become free.
func (s *session) feed(service *service, source <-chan amqp.Delivery) {
	for request := range source {
		select {
		case service.slots <- struct{}{}:
		case <-s.work.Done():
			continue // discard the rest of source
		}
		s.calls.Go(func() {
			defer func() { <-service.slots }()
			answer := answer{request: &request, reply: s.handle(s.work, service, &request)}
			s.conn.Release(len(request.Body))
			request.Body = nil // free the memory: the answer may have to wait for the broker
			select {
			case s.answers <- answer:
			case <-s.work.Done(): // the broker redelivers the request to another replica
			}
		})
	}
}

// drain stops the deliveries and waits for the session's calls. After the drain timeout it aborts them.
func (s *session) drain() error {
	expired := time.NewTimer(s.config.DrainTimeout)
	defer expired.Stop()
	go func() {
		for name := range s.services {
			// Cancel fails only if the connection is gone. If the broker has blocked the connection, Cancel hangs until then.
			_ = s.channel.Cancel(name, false)
		}
		s.feeds.Wait() // delivered requests are still accepted
		s.calls.Wait()
		close(s.answers)
	}()
	select {
	case err := <-s.written: // all answers are written, or a write failed
		return err
	case <-s.lost:
		return s.abandon(errLost)
	case <-expired.C:
		return s.abandon(errors.New("calls were aborted at the drain timeout"))
	}
}

// write sends answers until there are no more, and batches those that are ready.
func (s *session) write() error {
	for {
		select {
		case first, open := <-s.answers:
			if !open {
				return nil
			}
			var failure error
			if err := errors.Join(s.conn.Gather(func() { failure = s.writeReady(first) }), failure); err != nil {
				return fmt.Errorf("answer: %w", err)
			}
		case <-s.work.Done():
			return nil
		}
	}
}

// writeReady acks each request after its reply, on the same channel: so an acked request was answered, and any other is
// redelivered.
func (s *session) writeReady(next answer) error {
	for {
		if next.reply != nil {
			if err := s.channel.Publish("", next.request.ReplyTo, false, false, *next.reply); err != nil {
				return err
			}
		}
		if err := next.request.Ack(false); err != nil {
			return err
		}
		select {
		case another, open := <-s.answers:
			if !open {
				return nil // write notices this too
			}
			next = another
		default:
			return nil
		}
	}
}
