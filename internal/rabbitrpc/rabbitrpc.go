// Package rabbitrpc carries unary Connect RPCs over RabbitMQ. Transport is a connect.Transport for generated clients,
// and Server serves a connect.Server. Clients, handlers and interceptors are the same as over HTTP.
//
// A request goes to a direct exchange with the service's full name as routing key, and from there to the one queue of
// this name, which all replicas consume. The queue is the service registry and the load balancer, and the prefetch
// bounds the number of calls that a replica executes at once. The queue exists only while a replica does, so a
// request that no replica can serve is returned within milliseconds. The answer goes straight to the caller's
// connection ("direct reply-to").
//
// The package guarantees that an answer reaches the call that it belongs to and no other; that no request is begun
// after its deadline; that a request is begun more than once only if its method is declared idempotent; and that each
// call ends with an answer or with an error, which says so if the outcome is unknown. It does not guarantee that a
// request is executed. An answer is sent once: if it is lost, the call ends at its deadline. If an answer must not be
// lost, write the request to the outbox instead. docs/rpc-over-rabbitmq.md lists the differences from HTTP.
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

// Protocol is the value of connect.CallInfo.Protocol on both sides.
const Protocol = "amqp"

const (
	// directReply is the reply_to of a request, and the pseudo-queue that its sender consumes. The broker replaces it by
	// an address that begins with addressPrefix and leads only to the sender's channel.
	directReply   = "amq.rabbitmq.reply-to"
	addressPrefix = directReply + "."
)

// queueArguments are the arguments of a service's queue. All are explicit, because their defaults differ between
// versions and vhosts.
var queueArguments = amqp.Table{
	// Quorum queues cannot be deleted with their last consumer. And no request outlives the broker anyway.
	"x-queue-type": "classic",
	// The queue is durable, because RabbitMQ 4 deprecates shared transient queues. After a restart of the broker it exists
	// without a consumer whose end would delete it. Then it expires.
	"x-expires": int32(10_000),
}

// declareExchange declares the exchange if it does not exist. An existing exchange needs no permission to configure.
func declareExchange(conn *rabbit.Connection, name string) error {
	channel, err := conn.Channel() // a separate one, because a failure closes it
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

// ServiceOf returns the full name of the service in a procedure, /service/Method. It is also the name of the queue.
func ServiceOf(procedure string) string {
	service, _, _ := strings.Cut(strings.TrimPrefix(procedure, "/"), "/")
	return service
}

// fromContext returns the error of a call whose context has ended.
func fromContext(ctx context.Context) *connect.Error {
	code := connect.CodeCanceled
	if errors.Is(ctx.Err(), context.DeadlineExceeded) {
		code = connect.CodeDeadlineExceeded
	}
	return connect.NewError(code, ctx.Err().Error()).WithCause(ctx.Err())
}
