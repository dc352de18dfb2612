// Package rabbit publishes to RabbitMQ and consumes from it.
//
// The publisher guarantees that a message reported as published was routed to at least one queue and confirmed by
// every queue that it was routed to. The consumer guarantees that a delivery is acked only after its handler returned
// nil, and that deliveries of one key are handled one after the other in queue order. Both reconnect for as long as
// they run. The client library's own recovery is disabled, because it gives up after five attempts and turns
// outstanding confirms into nacks.
//
// Neither promises exactly-once delivery: if the outcome is unknown when a connection ends, the message is sent, or
// delivered, again.
package rabbit

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
)

const (
	// handshakeTimeout bounds dialing and the AMQP handshake.
	handshakeTimeout = 10 * time.Second
	// heartbeat is the heartbeat interval. A dead peer is detected within two intervals. Below 5 s, a busy broker would be
	// mistaken for a dead one.
	heartbeat = 10 * time.Second
	// closeTimeout bounds the graceful close of a connection. On a blocked connection the broker never responds.
	closeTimeout = 2 * time.Second
)

// Connection is the client library's connection together with the network connection beneath it.
type Connection struct {
	*amqp.Connection
	network *gatheringConn
}

// ErrNotConnected means that there is no connection to the broker: it is unreachable, or it refuses the user or the
// vhost.
var ErrNotConnected = errors.New("connect to rabbitmq")

// Dial connects, and gives up when ctx ends. The broker shows the name to its operators.
func Dial(ctx context.Context, url, name string) (*Connection, error) {
	properties := amqp.NewConnectionProperties()
	properties.SetClientConnectionName(cmp.Or(name, "unnamed"))
	uri, err := amqp.ParseURI(url)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrNotConnected, errBadURL)
	}
	var network *gatheringConn
	stop := func() bool { return true }
	// Dial sets up TLS itself: the library would wrap our connection in TLS, and our connection would not see the frames.
	conn, err := amqp.DialConfig(unencrypted(url), amqp.Config{
		Heartbeat: heartbeat, Properties: properties, Locale: "en_US",
		Dial: func(kind, _ string) (net.Conn, error) {
			conn, err := (&net.Dialer{Timeout: handshakeTimeout}).DialContext(ctx, kind, address(uri))
			if err != nil {
				return nil, err
			}
			stop = context.AfterFunc(ctx, func() { _ = conn.Close() })
			// The deadline covers only the handshakes: the library clears it afterwards.
			if err := conn.SetDeadline(time.Now().Add(handshakeTimeout)); err != nil {
				return nil, err
			}
			secured, err := secure(ctx, conn, uri)
			if err != nil {
				_ = conn.Close()
				return nil, err
			}
			source := newReadableConn(secured)
			network = &gatheringConn{Conn: source, network: conn, messages: source.messages}
			return network, nil
		},
	})
	stop()
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrNotConnected, err)
	}
	return &Connection{Connection: conn, network: network}, nil
}

// HangUp closes the connection, by force if the broker does not respond. The library's deadline alone does not bound
// this: every incoming frame extends it, and a broker that blocks the connection keeps sending heartbeats.
func (c *Connection) HangUp() {
	if c.network.messages.full() != nil { // the broker's response would not be read
		c.network.cut()
	}
	force := time.AfterFunc(closeTimeout, c.network.cut)
	defer force.Stop()
	_ = c.CloseDeadline(time.Now().Add(closeTimeout)) // neither side knows what is lost with the connection anyway
}

// Cut closes the network connection without the AMQP closing handshake. This also aborts pending writes.
func (c *Connection) Cut() { c.network.cut() }

// Gather calls fn, which publishes or acks, and batches its output into few writes. The last one happens when fn
// returns. An error means that a write failed, in this call or an earlier one, and that the connection is unusable.
func (c *Connection) Gather(fn func()) error { return c.network.gather(fn) }

// Check connects to the broker and returns nil if it responds. Use a Gauge for repeated checks.
func Check(ctx context.Context, url string) error {
	conn, err := Dial(ctx, url, "health check")
	if err != nil {
		return err
	}
	conn.HangUp()
	return nil
}

// errBadURL replaces the library's error, which shows the URL.
var errBadURL = errors.New("not an AMQP URL")

// ValidateURL returns nil if Dial can use the URL. Its error does not show the URL.
func ValidateURL(url string) error {
	if _, err := amqp.ParseURI(url); err != nil {
		return errBadURL
	}
	return nil
}
