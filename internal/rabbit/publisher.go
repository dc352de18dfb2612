package rabbit

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"regexp"
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
	// Queue, if set, receives all messages directly, instead of the topology's exchange. A replay to one consumer group
	// uses it.
	Queue string
	// Name is the connection name that the broker shows.
	Name string
	// Window is the largest number of messages without a verdict. Default 2,000. It is also the size of the buffer for
	// returns: the library drops a return that finds no room, and the message would then count as published.
	Window int
	// ConfirmTimeout is how long the publisher waits without any confirm before it abandons the connection. Default 30 s.
	// Time during which the broker has blocked the connection does not count.
	ConfirmTimeout time.Duration
	// MeterProvider takes the metrics. Default: the global one.
	MeterProvider metric.MeterProvider
}

// Publisher is a messaging.Publisher over its own connection, which it opens at the first Publish and again after
// each failure. A broker that is short of memory or disk stops reading from connections that publish, and only from
// those. So consumers must not share the connection.
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

// link is one connection with its channel in confirm mode. It is dropped at the first failure.
type link struct {
	conn      *Connection
	channel   *amqp.Channel
	topology  *Topology
	meters    *meters
	returns   chan amqp.Return
	closed    chan *amqp.Error
	blockings chan amqp.Blocking
	returned  map[string][]amqp.Return // by message ID: arrived and not yet matched to a message
	waiting   int                      // publishings without a verdict
	writing   chan struct{}            // closed when nothing is being written
	blocked   bool                     // the broker has blocked the connection
	reason    *amqp.Error              // why the channel was closed, once known
	broken    bool                     // a receipt has reported an unknown outcome
}

// Publish implements messaging.Publisher.
func (p *Publisher) Publish(ctx context.Context, messages []messaging.Message) (messaging.Receipt, error) {
	// A connection that ended is replaced only when no receipt waits for it: on a new connection, this page would overtake
	// those that the old one lost. Until their receipts have reported that, pages go to the old connection and are lost
	// too.
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
		const text = "%d messages in flight and %d more exceed the window of %d"
		return nil, fmt.Errorf(text, l.waiting, len(messages), p.config.Window)
	}
	l.waiting += len(messages)
	receipt := &receipt{link: l, messages: messages, timeout: p.config.ConfirmTimeout, written: make(chan struct{})}
	// A write to a connection that the broker has blocked hangs regardless of ctx. So a separate goroutine writes, and
	// closing the connection ends it. Pages are written one after the other, so the channel is never used concurrently.
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
		p.link.setBlocked(false)
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
		conn: conn, channel: channel, topology: &p.config.Topology, meters: &p.meters, writing: idle,
		returned:  map[string][]amqp.Return{},
		returns:   channel.NotifyReturn(make(chan amqp.Return, p.config.Window)),
		closed:    channel.NotifyClose(make(chan *amqp.Error, 1)),
		blockings: conn.NotifyBlocked(make(chan amqp.Blocking, 64)),
	}
	return nil
}

func (p *Publisher) open(ctx context.Context, conn *Connection) (*amqp.Channel, error) {
	// All queues are declared before anything is sent: at the very first start the relay may be faster than the consumers,
	// and messages that no queue takes are parked.
	if err := p.config.Topology.ensure(ctx, conn); err != nil {
		return nil, err
	}
	channel, err := conn.Channel()
	if err != nil {
		return nil, fmt.Errorf("open channel: %w", err)
	}
	if err := channel.Confirm(false); err != nil {
		return nil, fmt.Errorf("enable confirms: %w", err)
	}
	return channel, nil
}

// receipt is a messaging.Receipt.
type receipt struct {
	link     *link
	messages []messaging.Message
	timeout  time.Duration
	// timer fires when no confirm has arrived for the timeout. It keeps running between two calls of Wait.
	timer   *time.Timer
	written chan struct{}
	// write sets confirms and failure. They must not be read before written is closed.
	confirms []*amqp.DeferredConfirmation
	failure  error // why the remaining messages were not written
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

// Wait implements messaging.Receipt.
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
		return r.unknown(r.verdicts, r.link.closeVerdict(r.failure))
	}
	return r.verdicts
}

// await waits for done. The timer does not count while the broker blocks the connection.
func (r *receipt) await(ctx context.Context, done <-chan struct{}) error {
	select {
	case <-done:
		return nil
	default:
	}
	for {
		expired := r.timer.C
		if r.link.blocked {
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
			r.timer.Reset(0) // another call fails at once
			return fmt.Errorf("no confirm within %s", r.timeout)
		case state, open := <-r.link.blockings:
			if !open { // the connection ended, and done is about to be closed
				r.link.blockings = nil
			}
			r.link.setBlocked(open && state.Active)
			r.timer.Reset(r.timeout)
		}
	}
}

// verdict returns the outcome of a publishing whose confirm has arrived. For an unroutable message the broker sends
// the return first and then an ack, and the library passes them on in that order. So when the confirm is here, the
// return is in the buffer.
func (r *receipt) verdict(i int) error {
	r.link.drainReturns()
	if returned, ok := r.link.takeReturn(&r.messages[i]); ok {
		return fmt.Errorf("%w: %d %s", messaging.ErrReturned, returned.ReplyCode, returned.ReplyText)
	}
	switch {
	case r.confirms[i].Acked():
		return nil
	case r.link.channel.IsClosed():
		// The library nacks everything when a channel closes, but the broker may have the message anyway.
		return r.link.closeVerdict(amqp.ErrClosed)
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

func (l *link) setBlocked(blocked bool) {
	if blocked != l.blocked {
		l.blocked = blocked
		l.meters.change(l.meters.blocked, blocked)
	}
}

// closeVerdict is the verdict on messages that were outstanding when the channel closed: refused if the broker refused
// something that was published, otherwise unknown. The library reports the reason before it ends the confirms.
func (l *link) closeVerdict(otherwise error) error {
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
	return l.topology.classify(l.reason)
}

// refusedTopic matches the broker's error for a message type that the user may not publish. The broker cuts its errors
// to 255 bytes, so the end of a long type may be missing.
var refusedTopic = regexp.MustCompile(`access to topic '([^']*)`)

// classify recognizes refusals of a message: it is too large (406, 311), has a property that the broker does not accept
// (406, 502), or belongs to another service (403). Other errors, such as a missing exchange (404) or permission (403),
// concern the broker's state and must be fixed there. The missing permission for a type of this service is one of them.
func (t *Topology) classify(reason *amqp.Error) error {
	topic := refusedTopic.FindStringSubmatch(reason.Reason)
	switch {
	case reason.Code == amqp.AccessRefused && topic != nil && t.owns(topic[1]):
		const cure = "set the topic permissions of the relay's user (the command topology shows them)"
		return fmt.Errorf("%w: %s: %w", messaging.ErrUnknown, cure, reason)
	case reason.Code == amqp.AccessRefused && topic != nil,
		slices.Contains([]int{amqp.ContentTooLarge, amqp.PreconditionFailed, amqp.SyntaxError}, reason.Code):
		return fmt.Errorf("%w: %w", messaging.ErrRefused, reason)
	}
	return fmt.Errorf("%w: %w", messaging.ErrUnknown, reason)
}
