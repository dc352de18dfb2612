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

// session is one connection, and what is under way on it.
type session struct {
	*Server
	conn    *rabbit.Connection
	channel *amqp.Channel
	lost    <-chan *amqp.Error // of the channel
	work    context.Context    // of the calls: it ends with the session
	cancel  context.CancelFunc
	answers chan answer
	written chan error // gets the writer's result
	feeds   sync.WaitGroup
	calls   sync.WaitGroup
}

// answer settles a request: it is acked, after the reply, if any.
type answer struct {
	request *amqp.Delivery
	reply   *amqp.Publishing
}

var (
	errDeliveriesEnded = errors.New("the broker ended the deliveries")
	errLost            = errors.New("connection lost")
)

// session serves over one connection until that ends, or ctx is done and everything is answered. Calls whose connection is lost are
// cancelled: nobody can be answered, and the broker hands their requests to another replica.
func (s *Server) session(ctx context.Context) error {
	conn, err := rabbit.Dial(ctx, s.config.URL, s.config.Name)
	if err != nil {
		return unlessDone(ctx, err)
	}
	defer conn.HangUp()
	conn.Hold(s.config.MaxBytes)
	one := &session{Server: s, conn: conn, answers: make(chan answer, s.config.Prefetch), written: make(chan error, 1)}
	one.work, one.cancel = context.WithCancel(context.WithoutCancel(ctx))
	defer one.cancel()
	stop := context.AfterFunc(ctx, conn.Cut)
	sources, err := one.subscribe()
	if !stop() || err != nil {
		return unlessDone(ctx, err)
	}
	ended := make(chan struct{}, len(sources))
	for name, source := range sources {
		one.feeds.Go(func() {
			one.feed(s.services[name], source)
			ended <- struct{}{}
		})
	}
	go func() { one.written <- one.write() }()
	select {
	case <-ctx.Done():
		return one.drain()
	case reason := <-one.lost:
		return one.abandon(errors.Join(errLost, asError(reason)))
	case err := <-one.written:
		one.written <- err
		return one.abandon(err)
	case <-ended: // of a queue that was deleted, when channel and connection stay open
		return errors.Join(errDeliveriesEnded, one.drain())
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

// unlessDone is the error of a session that has not begun.
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

// feed begins the calls of a service, each when there is room for it.
func (s *session) feed(service *service, source <-chan amqp.Delivery) {
	for request := range source {
		select {
		case service.slots <- struct{}{}:
		case <-s.work.Done():
			continue // to the end of source
		}
		s.calls.Go(func() {
			defer func() { <-service.slots }()
			answer := answer{request: &request, reply: s.handle(s.work, service, &request)}
			s.conn.Release(len(request.Body))
			request.Body = nil // the answer may wait for the broker
			select {
			case s.answers <- answer:
			case <-s.work.Done(): // by another replica, then
			}
		})
	}
}

// drain ends the deliveries, and the session's calls by letting them finish, or by force when the time is up.
func (s *session) drain() error {
	expired := time.NewTimer(s.config.DrainTimeout)
	defer expired.Stop()
	go func() {
		for name := range s.services {
			_ = s.channel.Cancel(name, false) // fails only if the connection is gone, and hangs until then if the broker has blocked us
		}
		s.feeds.Wait() // what has been delivered is accepted
		s.calls.Wait()
		close(s.answers)
	}()
	select {
	case err := <-s.written: // all of them
		return err
	case <-s.lost:
		return s.abandon(errLost)
	case <-expired.C:
		return s.abandon(errors.New("calls were cut off"))
	}
}

// write sends answers, those that are ready in one go, until there will be no more.
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

// writeReady acks each request after its reply and on the same channel: a request that is acked was answered, one that is not comes again.
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
				return nil // as write finds, too
			}
			next = another
		default:
			return nil
		}
	}
}
