// Package rabbit publishes to RabbitMQ and consumes from it.
//
// The publisher guarantees that a message it reports as published is confirmed by every queue that it was routed to, and was routed to
// at least one. The consumer guarantees that a delivery is acked only after its handler returned nil, and that deliveries of one key
// are handled one after the other in the order of the queue. Both reconnect for as long as they run; the client library's own
// recovery is off, since it gives up after five tries and turns the confirms that are under way into nacks.
//
// Neither promises that something is delivered once: what is unknown when a connection ends is sent, or delivered, again.
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
	// handshakeTimeout bounds dialling and the AMQP handshake.
	handshakeTimeout = 10 * time.Second
	// heartbeat finds a dead peer within two of its intervals. Below 5 s a busy broker is taken for a dead one.
	heartbeat = 10 * time.Second
	// closeTimeout bounds the polite end of a connection. A blocked connection never answers.
	closeTimeout = 2 * time.Second
)

// Connection is the library's connection, and the network connection beneath it.
type Connection struct {
	*amqp.Connection
	network *gatheringConn
}

// ErrNotConnected means that there is no connection to the broker: it cannot be reached, or refuses the user or the
// vhost.
var ErrNotConnected = errors.New("connect to rabbitmq")

// Dial connects, and gives up when ctx ends. The name is shown to the broker's operators.
func Dial(ctx context.Context, url, name string) (*Connection, error) {
	properties := amqp.NewConnectionProperties()
	properties.SetClientConnectionName(cmp.Or(name, "unnamed"))
	uri, err := amqp.ParseURI(url)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrNotConnected, errNoURL)
	}
	var network *gatheringConn
	stop := func() bool { return true }
	// The library would put TLS around our connection, and hide the frames from it.
	conn, err := amqp.DialConfig(unencrypted(url), amqp.Config{
		Heartbeat: heartbeat, Properties: properties, Locale: "en_US",
		Dial: func(kind, _ string) (net.Conn, error) {
			conn, err := (&net.Dialer{Timeout: handshakeTimeout}).DialContext(ctx, kind, address(uri))
			if err != nil {
				return nil, err
			}
			stop = context.AfterFunc(ctx, func() { _ = conn.Close() })
			// For the handshakes only: the library takes it off again.
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

// HangUp closes the connection, by force if the broker does not answer. The library's deadline alone does not bound it: every frame
// that comes in puts it off, and a broker that blocks us goes on sending heartbeats.
func (c *Connection) HangUp() {
	if c.network.messages.full() != nil { // then the broker's answer would not be read
		c.network.cut()
	}
	force := time.AfterFunc(closeTimeout, c.network.cut)
	defer force.Stop()
	_ = c.CloseDeadline(time.Now().Add(closeTimeout)) // what is lost with it is unknown to both sides anyway
}

// Cut ends the connection without a word, and with it whatever hangs in writing to it.
func (c *Connection) Cut() { c.network.cut() }

// Gather calls fn, which publishes, and sends at its end what has not been sent by then: many publishings and acks in one write. An error
// is that of a write, here or in an earlier call, and means the end of the connection.
func (c *Connection) Gather(fn func()) error { return c.network.gather(fn) }

// Check connects and says whether the broker is there. Use a Gauge to ask repeatedly.
func Check(ctx context.Context, url string) error {
	conn, err := Dial(ctx, url, "health check")
	if err != nil {
		return err
	}
	conn.HangUp()
	return nil
}

// errNoURL stands for the library's error, which shows the URL.
var errNoURL = errors.New("not an AMQP URL")

// ValidateURL says whether url is one that Dial could use. Its error does not show the URL.
func ValidateURL(url string) error {
	if _, err := amqp.ParseURI(url); err != nil {
		return errNoURL
	}
	return nil
}
