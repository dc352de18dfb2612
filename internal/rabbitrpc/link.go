package rabbitrpc

import (
	"context"
	"fmt"
	"sync"

	"connectrpc.com/connect/v2"
	"example.com/shop/internal/rabbit"
	amqp "github.com/rabbitmq/amqp091-go"
)

// call is a request under way.
type call struct {
	id         string
	ctx        context.Context // a call is as short-lived as its context
	publishing amqp.Publishing
	routingKey string
	written    bool         // guarded by the link's mu
	outcome    chan outcome // has room for the one outcome, sent by whoever takes the call out of pending
}

// outcome is a reply, or the reason why there will be none.
type outcome struct {
	reply *amqp.Delivery
	err   *connect.Error
}

// link is one connection with its channel, which both sends requests and gets the replies: direct reply-to demands that. It is thrown
// away at the first failure, and replies to what it sent never reach another one.
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
	lost    *connect.Error // why nothing can be sent any more
}

const (
	// outgoingCalls is how many calls may wait to be written. More wait in their own goroutines.
	outgoingCalls = 256
	// returnBuffer is large enough that the library's reader rarely waits for ours.
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
		transport: t, conn: conn, channel: channel, replies: replies, returns: channel.NotifyReturn(make(chan amqp.Return, returnBuffer)),
		outgoing: make(chan *call, outgoingCalls), gone: make(chan struct{}), pending: map[string]*call{},
	}, nil
}

// send registers the call, so that no answer can come before somebody waits for it, and hands it to the writer.
func (l *link) send(c *call) error {
	if err := l.register(c); err != nil {
		return err
	}
	select {
	case l.outgoing <- c:
	case <-c.ctx.Done(): // found by who waits for the outcome
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
		return connect.Errorf(connect.CodeResourceExhausted, "%d calls are under way, which is the most; nothing was sent", limit)
	}
	l.pending[c.id] = c
	return nil
}

// take takes the call out of pending, and returns nil if it is not there, or no more. Whoever gets it, ends it.
func (l *link) take(id string) *call {
	l.mu.Lock()
	defer l.mu.Unlock()
	c := l.pending[id]
	delete(l.pending, id)
	return c
}

// begin says whether the call is to be written: its caller may have gone.
func (l *link) begin(c *call) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.pending[c.id] == nil {
		return false // and c is somebody else's
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
		err := connect.NewError(connect.CodeUnavailable, "connection to the broker lost; nothing was sent").WithCause(reason)
		if c.written {
			err = connect.NewError(connect.CodeUnavailable, "connection to the broker lost; outcome unknown").WithCause(reason)
		}
		c.outcome <- outcome{err: err}
	}
}

// write writes calls, those that wait in one go. It has a goroutine of its own, because a broker that has blocked the connection lets
// writes hang whatever the context of a call says.
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
			// An error means that the channel is closed, and read hears of that.
			_ = l.channel.Publish(l.transport.config.Exchange, c.routingKey, true, false, c.publishing)
		}
		select {
		case c = <-l.outgoing:
		default:
			return
		}
	}
}

// read hands out replies and returns until the link is lost, by whomever, and hangs up.
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
	l.conn.HangUp() // and with that, closed is closed
	lost := connect.NewError(connect.CodeUnavailable, "connection to the broker lost")
	if reason := <-closed; reason != nil {
		lost = lost.WithCause(reason)
	}
	l.lose(lost)
	for range l.replies { // lets the library's goroutine end
	}
}

// reply ends the call that a reply belongs to. Late ones, second ones and forged ones belong to none: a call's ID is random, and known to
// the server that it was sent to only.
func (l *link) reply(reply *amqp.Delivery) {
	c := l.take(reply.CorrelationId)
	if c == nil {
		l.transport.meters.drop(l.transport.life, "unexpected_reply")
		return
	}
	c.outcome <- outcome{reply: reply}
}

func (l *link) returned(returned *amqp.Return) {
	if c := l.take(returned.CorrelationId); c != nil {
		c.outcome <- outcome{err: connect.Errorf(connect.CodeUnavailable, "nobody serves %s; nothing was done", returned.RoutingKey)}
	}
}
