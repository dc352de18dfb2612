package rabbit

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"example.com/shop/internal/dev/failpoint"
	"example.com/shop/internal/messaging"
	amqp "github.com/rabbitmq/amqp091-go"
	"go.opentelemetry.io/otel/metric"
)

// PublisherConfig sets up a Publisher.
type PublisherConfig struct {
	URL      string
	Topology Topology
	// Queue, if given, is the one queue that everything goes to, instead of the topology's exchange: for a replay to one consumer group.
	Queue string
	// Name is the connection's name in the broker's eyes.
	Name string
	// Window is the most messages that may be without verdict. Default 2,000. Returns are buffered up to this number: the library drops
	// a return that finds no room, and the message would pass for published.
	Window int
	// ConfirmTimeout is how long nothing may be heard of a publishing before the connection is given up. Default 30 s. The time during which
	// the broker has blocked the connection does not count.
	ConfirmTimeout time.Duration
	// MeterProvider takes the metrics. Default: the global one.
	MeterProvider metric.MeterProvider
}

// Publisher is a messaging.Publisher over one connection of its own, made at the first Publish and again after each failure. A broker
// that is short of memory or disk stops reading from connections that publish, and from those only: consumers must not share it.
type Publisher struct {
	config PublisherConfig
	meters meters
	link   *link
}

// NewPublisher makes a Publisher. It does not connect.
func NewPublisher(config PublisherConfig) *Publisher {
	config.Window = cmp.Or(config.Window, 2000)
	config.ConfirmTimeout = cmp.Or(config.ConfirmTimeout, 30*time.Second)
	return &Publisher{config: config, meters: newMeters(config.MeterProvider, "publisher")}
}

// link is one connection with its channel in confirm mode. It is thrown away at the first failure.
type link struct {
	conn     *Connection
	channel  *amqp.Channel
	meters   *meters
	returns  chan amqp.Return
	closed   chan *amqp.Error
	blocked  chan amqp.Blocking
	returned map[string][]amqp.Return // by message ID: arrived, and not yet joined to a receipt
	waiting  int                      // publishings without verdict
	writing  chan struct{}            // closed when nothing is being written
	stopped  bool                     // the broker has blocked the connection
	reason   *amqp.Error              // why the channel ended, once that has been heard
	broken   bool                     // a receipt has told that something is unknown
}

// Publish implements messaging.Publisher.
func (p *Publisher) Publish(ctx context.Context, messages []messaging.Message) (messaging.Receipt, error) {
	// A connection that ended is replaced only when nothing is waiting for it: on a new one, this page would overtake those that the
	// old one lost. Until their receipts have told so, pages go to the old one, and are lost as well.
	if l := p.link; l != nil && (l.broken || l.waiting == 0 && l.channel.IsClosed()) {
		_ = p.Close()
	}
	if p.link == nil {
		if err := p.connect(ctx); err != nil {
			return nil, err
		}
	}
	l := p.link
	if l.waiting+len(messages) > p.config.Window {
		return nil, fmt.Errorf("%d messages in flight and %d more exceed the window of %d", l.waiting, len(messages), p.config.Window)
	}
	l.waiting += len(messages)
	receipt := &receipt{link: l, messages: messages, timeout: p.config.ConfirmTimeout, written: make(chan struct{})}
	// A blocked broker lets the write hang, whatever the context: the write has a goroutine of its own, and closing the
	// connection ends it. One page is written after the other, so the channel is never shared.
	previous := l.writing
	l.writing = receipt.written
	go func() {
		defer close(receipt.written)
		<-previous
		if err := l.conn.Gather(func() { receipt.write(&p.config) }); err != nil && receipt.failure == nil {
			receipt.failure = err
		}
	}()
	return receipt, nil
}

// Close implements messaging.Publisher.
func (p *Publisher) Close() error {
	if p.link != nil {
		p.link.conn.HangUp()
		<-p.link.writing
		p.link.setStopped(false)
		p.link = nil
	}
	return nil
}

func (p *Publisher) connect(ctx context.Context) error {
	conn, err := Dial(ctx, p.config.URL, p.config.Name)
	p.meters.connected(ctx, err)
	if err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, conn.Cut)
	channel, err := p.open(ctx, conn)
	if !stop() {
		err = ctx.Err()
	}
	if err != nil {
		conn.HangUp()
		return err
	}
	idle := make(chan struct{})
	close(idle)
	p.link = &link{
		conn: conn, channel: channel, meters: &p.meters, writing: idle, returned: map[string][]amqp.Return{},
		returns: channel.NotifyReturn(make(chan amqp.Return, p.config.Window)),
		closed:  channel.NotifyClose(make(chan *amqp.Error, 1)),
		blocked: conn.NotifyBlocked(make(chan amqp.Blocking, 64)),
	}
	return nil
}

func (p *Publisher) open(ctx context.Context, conn *Connection) (*amqp.Channel, error) {
	// Everything that might receive is declared before anything is sent: at the very first start the relay may be quicker than the
	// consumers, and what no queue wants is parked.
	if err := p.config.Topology.ensure(ctx, conn); err != nil {
		return nil, err
	}
	channel, err := conn.Channel()
	if err != nil {
		return nil, fmt.Errorf("open channel: %w", err)
	}
	if err := channel.Confirm(false); err != nil {
		return nil, fmt.Errorf("switch confirms on: %w", err)
	}
	return channel, nil
}

// receipt is a messaging.Receipt.
type receipt struct {
	link     *link
	messages []messaging.Message
	timeout  time.Duration
	// timer fires when nothing has been heard for the timeout. It goes on between two calls of Wait.
	timer   *time.Timer
	written chan struct{}
	// Filled by write, and to be read when written is closed.
	confirms []*amqp.DeferredConfirmation
	failure  error // why the rest of the messages was not written
	verdicts []error
}

func (r *receipt) write(config *PublisherConfig) {
	r.confirms = make([]*amqp.DeferredConfirmation, 0, len(r.messages))
	for _, message := range r.messages {
		failpoint.Hit("relay.publishing")
		exchange, routingKey := config.Topology.Exchange, message.Type
		if config.Queue != "" {
			exchange, routingKey = "", config.Queue
		}
		confirm, err := r.link.channel.PublishWithDeferredConfirm(exchange, routingKey, true, false, encode(message))
		if err != nil {
			r.failure = err
			return
		}
		r.confirms = append(r.confirms, confirm)
	}
}

// Wait implements messaging.Receipt. It may be called again after ctx ended it.
func (r *receipt) Wait(ctx context.Context) []error {
	if r.timer == nil {
		r.timer = time.NewTimer(r.timeout)
	}
	if err := r.await(ctx, r.written); err != nil {
		return r.unknown(r.verdicts, err)
	}
	for i := len(r.verdicts); i < len(r.confirms); i++ {
		if err := r.await(ctx, r.confirms[i].Done()); err != nil {
			return r.unknown(r.verdicts, err)
		}
		r.verdicts = append(r.verdicts, r.verdict(i))
		r.link.waiting--
	}
	if r.failure != nil {
		return r.unknown(r.verdicts, r.link.whyClosed(r.failure))
	}
	return r.verdicts
}

// await waits for done. While the broker blocks the connection, the timer stands still.
func (r *receipt) await(ctx context.Context, done <-chan struct{}) error {
	select {
	case <-done:
		return nil
	default:
	}
	for {
		expired := r.timer.C
		if r.link.stopped {
			expired = nil
		}
		select {
		case <-done:
			r.timer.Reset(r.timeout)
			return nil
		case <-ctx.Done():
			return ctx.Err()
		case <-expired:
			r.link.broken = true
			r.timer.Reset(0) // for who calls again
			return fmt.Errorf("no confirm within %s", r.timeout)
		case state, open := <-r.link.blocked:
			if !open { // the connection ended, and done is about to be closed
				r.link.blocked = nil
			}
			r.link.setStopped(open && state.Active)
			r.timer.Reset(r.timeout)
		}
	}
}

// verdict tells the outcome of a publishing whose confirm has arrived. For an unroutable message the broker sends the return first
// and then an ack, and the library hands them on in that order: once the confirm is here, the return is in the buffer.
func (r *receipt) verdict(i int) error {
	r.link.drainReturns()
	if returned, ok := r.link.takeReturn(&r.messages[i]); ok {
		return fmt.Errorf("%w: %d %s", messaging.ErrReturned, returned.ReplyCode, returned.ReplyText)
	}
	switch {
	case r.confirms[i].Acked():
		return nil
	case r.link.channel.IsClosed():
		// The library nacks everything when a channel closes; the broker may have it all the same.
		return r.link.whyClosed(amqp.ErrClosed)
	}
	return messaging.ErrNacked
}

func (r *receipt) unknown(verdicts []error, cause error) []error {
	if !errors.Is(cause, messaging.ErrRefused) {
		cause = fmt.Errorf("%w: %w", messaging.ErrUnknown, cause)
	}
	rest := len(r.messages) - len(verdicts)
	return append(slices.Clip(verdicts), slices.Repeat([]error{cause}, rest)...)
}

func (l *link) setStopped(stopped bool) {
	if stopped != l.stopped {
		l.stopped = stopped
		l.meters.change(l.meters.blocked, stopped)
	}
}

// whyClosed turns the end of the channel into a verdict: the broker's refusal of something that was published, or unknown. The library
// reports the reason before it ends the confirms.
func (l *link) whyClosed(otherwise error) error {
	l.broken = true
	if l.reason == nil {
		select {
		case l.reason = <-l.closed:
		default:
		}
	}
	if l.reason == nil {
		return fmt.Errorf("%w: %w", messaging.ErrUnknown, otherwise)
	}
	return classify(l.reason)
}

// classify knows the refusals that are about a message: too large (406, 311), or a property that the broker does not take (406, 502).
// Others, a missing exchange (404) or permission (403) among them, are about the broker's state and mended there.
func classify(reason *amqp.Error) error {
	switch reason.Code {
	case amqp.ContentTooLarge, amqp.PreconditionFailed, amqp.SyntaxError:
		return fmt.Errorf("%w: %w", messaging.ErrRefused, reason)
	}
	return fmt.Errorf("%w: %w", messaging.ErrUnknown, reason)
}
