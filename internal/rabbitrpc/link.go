package rabbitrpc

import (
	"context"
	"fmt"
	"sync"

	"connectrpc.com/connect/v2"
	"example.com/shop/internal/rabbit"
	amqp "github.com/rabbitmq/amqp091-go"
)

// call is a request in flight.
type call struct {
	id         string
	ctx        context.Context // a call is as short-lived as its context
	publishing amqp.Publishing
	routingKey string
	written    bool         // guarded by the link's mu
	outcome    chan outcome // buffered; the goroutine that takes the call out of pending sends the only outcome
}

// outcome is a reply, or the reason why there is none.
type outcome struct {
	reply *amqp.Delivery
	err   *connect.Error
}

// link is one connection with one channel, which both sends requests and receives the replies: direct reply-to requires
// this. It is dropped at the first failure, and replies to its requests never reach another link.
type link struct {
	transport *Transport
	conn      *rabbit.Connection
	channel   *amqp.Channel
	replies   <-chan amqp.Delivery
	returns   <-chan amqp.Return
	outgoing  chan *call
	gone      chan struct{} // closed when the link is lost

	mu      sync.Mutex
	pending map[string]*call
	lost    *connect.Error // why nothing more can be sent
}

const (
	// outgoingCalls is the number of calls that can be queued for writing. Further calls wait in their own goroutines.
	outgoingCalls = 256
	// returnBuffer is large enough that the library's reader rarely has to wait for ours.
	returnBuffer = 256
)

func (t *Transport) newLink(conn *rabbit.Connection) (*link, error) {
	if err := declareExchange(conn, t.config.Exchange); err != nil {
		return nil, err
	}
	channel, err := conn.Channel()
	if err != nil {
		return nil, fmt.Errorf("open channel: %w", err)
	}
	replies, err := channel.Consume(directReply, "", true, false, false, false, nil)
	if err != nil {
		return nil, fmt.Errorf("consume replies: %w", err)
	}
	return &link{
		transport: t, conn: conn, channel: channel, replies: replies,
		returns:  channel.NotifyReturn(make(chan amqp.Return, returnBuffer)),
		outgoing: make(chan *call, outgoingCalls), gone: make(chan struct{}), pending: map[string]*call{},
	}, nil
}

// send registers the call before it passes it to the writer, so that the reply cannot arrive too early.
func (l *link) send(c *call) error {
	if err := l.register(c); err != nil {
		return err
	}
	select {
	case l.outgoing <- c:
	case <-c.ctx.Done(): // the goroutine that waits for the outcome notices this
	case <-l.gone:
	}
	return nil
}

func (l *link) register(c *call) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.lost != nil {
		return l.lost
	}
	if limit := l.transport.config.MaxInFlight; len(l.pending) >= limit {
		const text = "the maximum of %d calls is in flight; nothing was sent"
		return connect.Errorf(connect.CodeResourceExhausted, text, limit)
	}
	l.pending[c.id] = c
	return nil
}

// take removes the call from pending, and returns nil if it is not pending (any more). The caller of take must end the
// call.
func (l *link) take(id string) *call {
	l.mu.Lock()
	defer l.mu.Unlock()
	c := l.pending[id]
	delete(l.pending, id)
	return c
}

// begin reports whether to write the call: its caller may be gone.
func (l *link) begin(c *call) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.pending[c.id] == nil {
		return false // another goroutine owns c now
	}
	c.written = true
	return true
}

func (l *link) isLost() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.lost != nil
}

// lose ends the link and all calls on it. The first reason counts.
func (l *link) lose(reason *connect.Error) {
	l.mu.Lock()
	if l.lost != nil {
		l.mu.Unlock()
		return
	}
	l.lost = reason
	pending := l.pending
	l.pending = nil
	l.mu.Unlock()
	close(l.gone)
	for _, c := range pending {
		text := "connection to the broker lost; nothing was sent"
		if c.written {
			text = "connection to the broker lost; outcome unknown"
		}
		c.outcome <- outcome{err: connect.NewError(connect.CodeUnavailable, text).WithCause(reason)}
	}
}

// write writes calls, and batches those that are queued. It runs in a separate goroutine, because a write to a
// connection that the broker has blocked hangs regardless of any call's context.
func (l *link) write() {
	for {
		select {
		case first := <-l.outgoing:
			if err := l.conn.Gather(func() { l.writeWaiting(first) }); err != nil {
				l.lose(connect.NewError(connect.CodeUnavailable, "connection to the broker lost").WithCause(err))
				return
			}
		case <-l.gone:
			return
		}
	}
}

func (l *link) writeWaiting(c *call) {
	for {
		if l.begin(c) {
			// An error means that the channel is closed, which read notices.
			_ = l.channel.Publish(l.transport.config.Exchange, c.routingKey, true, false, c.publishing)
		}
		select {
		case c = <-l.outgoing:
		default:
			return
		}
	}
}

// read passes on replies and returns until the link is lost for any reason, and then hangs up.
func (l *link) read() {
	closed := l.channel.NotifyClose(make(chan *amqp.Error, 1))
	for {
		select {
		case reply, open := <-l.replies:
			if open {
				l.reply(&reply)
				continue
			}
		case returned, open := <-l.returns:
			if open {
				l.returned(&returned)
				continue
			}
		case <-l.gone:
		}
		break
	}
	l.conn.HangUp() // after this, receiving from closed does not block
	lost := connect.NewError(connect.CodeUnavailable, "connection to the broker lost")
	if reason := <-closed; reason != nil {
		lost = lost.WithCause(reason)
	}
	l.lose(lost)
	for range l.replies { // lets the library's goroutine end
	}
}

// reply ends the call that a reply belongs to. Late, duplicate and forged replies belong to no call: a call's ID is
// random and known only to the server that received the request.
func (l *link) reply(reply *amqp.Delivery) {
	c := l.take(reply.CorrelationId)
	if c == nil {
		l.transport.meters.drop(l.transport.lifetime, "unexpected_reply")
		return
	}
	c.outcome <- outcome{reply: reply}
}

func (l *link) returned(returned *amqp.Return) {
	if c := l.take(returned.CorrelationId); c != nil {
		const text = "no replica serves %s; nothing was done"
		c.outcome <- outcome{err: connect.Errorf(connect.CodeUnavailable, text, returned.RoutingKey)}
	}
}
