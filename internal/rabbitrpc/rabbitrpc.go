// Package rabbitrpc carries unary Connect RPCs over RabbitMQ: Transport is a connect.Transport for generated clients, Server serves a
// connect.Server. Client, handlers and interceptors are those of HTTP.
//
// A request goes to a direct exchange with the service's full name as routing key, and there to the one queue of this name that all
// replicas consume: the queue is the service registry and the load balancer, the prefetch bounds what a replica takes on at once. The
// queue is there while a replica is, so that a request which nobody could serve comes back in milliseconds. The answer goes straight to
// the connection of the caller ("direct reply-to").
//
// It guarantees that an answer reaches the call that it belongs to and no other, that a request is never begun after its deadline, that it
// is begun more than once only if its method is declared idempotent, and that each call ends: with an answer, or with an error that says
// when the outcome is unknown. It does not guarantee that a request is executed, and an answer is sent once: if it is lost, the call ends
// at its deadline. Where an answer must not be lost, the request belongs into the outbox. docs/rpc-over-rabbitmq.md lists what differs from HTTP.
package rabbitrpc

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"connectrpc.com/connect/v2"
	"example.com/shop/internal/rabbit"
	amqp "github.com/rabbitmq/amqp091-go"
)

// DefaultExchange is the exchange that requests go to unless another one is configured.
const DefaultExchange = "rpc"

// Protocol is what connect.CallInfo.Protocol says on both sides.
const Protocol = "amqp"

const (
	// directReply is where a request asks to be answered, and where its sender consumes. The broker makes an address of it, which begins
	// with addressPrefix and leads to the sender's channel and nowhere else.
	directReply   = "amq.rabbitmq.reply-to"
	addressPrefix = directReply + "."
)

// queueArguments are those of a service's queue, all of them explicit since their defaults differ between versions and vhosts.
var queueArguments = amqp.Table{
	"x-queue-type": "classic", // quorum queues cannot be deleted with their last consumer, and no request outlives the broker anyway
	// The queue is durable, because RabbitMQ 4 deprecates shared queues that are not. After a restart of the broker it is back without any
	// consumer whose end would delete it: then time does.
	"x-expires": int32(10_000),
}

// declareExchange makes the exchange if it is not there. One that is there takes no permission to use.
func declareExchange(conn *rabbit.Connection, name string) error {
	channel, err := conn.Channel() // of its own, since a failure closes it
	if err != nil {
		return fmt.Errorf("open channel: %w", err)
	}
	err = channel.ExchangeDeclarePassive(name, amqp.ExchangeDirect, true, false, false, false, nil)
	if isNotFound(err) {
		if channel, err = conn.Channel(); err == nil {
			err = channel.ExchangeDeclare(name, amqp.ExchangeDirect, true, false, false, false, nil)
		}
	}
	if err != nil {
		return fmt.Errorf("declare exchange %s: %w", name, err)
	}
	return channel.Close()
}

func isNotFound(err error) bool {
	var refused *amqp.Error
	return errors.As(err, &refused) && refused.Code == amqp.NotFound
}

// ServiceOf returns the full name of the service in a procedure, /service/Method: the name of its queue.
func ServiceOf(procedure string) string {
	service, _, _ := strings.Cut(strings.TrimPrefix(procedure, "/"), "/")
	return service
}

// fromContext is the error of a call whose context has ended.
func fromContext(ctx context.Context) *connect.Error {
	code := connect.CodeCanceled
	if errors.Is(ctx.Err(), context.DeadlineExceeded) {
		code = connect.CodeDeadlineExceeded
	}
	return connect.NewError(code, ctx.Err().Error()).WithCause(ctx.Err())
}
