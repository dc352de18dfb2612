package rabbitrpc

import (
	"context"
	"fmt"
	"time"

	"example.com/shop/internal/rabbit"
	amqp "github.com/rabbitmq/amqp091-go"
)

// ServerPermissions are all that a server of these services needs. It declares their queues and, as the first server,
// the exchange. It also writes to the default exchange, where replies go. The broker then allows writes to any queue;
// the server itself makes sure that it sends nothing but replies.
func ServerPermissions(exchange string, services ...string) rabbit.Permissions {
	own := rabbit.Only(append([]string{exchange}, services...)...)
	written := rabbit.Only(append([]string{"amq.default"}, services...)...)
	return rabbit.Permissions{Configure: own, Write: written, Read: own}
}

// ClientPermissions are all that a client needs: it may send any request, and can read no messages but its own replies.
func ClientPermissions(exchange string) rabbit.Permissions {
	return rabbit.Permissions{Configure: rabbit.Only(), Write: rabbit.Only(exchange), Read: rabbit.Only()}
}

// ServiceState is the state of a service as the broker reports it.
type ServiceState struct {
	Name string
	// Replicas is the number of servers that consume the service's queue. With 0, calls end with unavailable.
	Replicas int
	// Waiting is the number of requests that no server has received yet.
	Waiting int
}

// Look returns the states of the services with these full names, in this order. It changes nothing. Since 4.2.7
// RabbitMQ requires that the user has some permission for the queues.
func Look(ctx context.Context, url string, names ...string) ([]ServiceState, error) {
	conn, err := rabbit.Dial(ctx, url, "rpc ls")
	if err != nil {
		return nil, err
	}
	defer conn.HangUp()
	defer context.AfterFunc(ctx, conn.Cut)()
	states := make([]ServiceState, len(names))
	for i, name := range names {
		channel, err := conn.Channel() // a new one each time, because a missing queue closes it
		if err != nil {
			return nil, fmt.Errorf("open channel: %w", err)
		}
		queue, err := channel.QueueDeclarePassive(name, true, true, false, false, nil)
		if err != nil && !isNotFound(err) {
			return nil, fmt.Errorf("check queue %s: %w", name, err)
		}
		states[i] = ServiceState{Name: name, Replicas: queue.Consumers, Waiting: queue.Messages}
		if err == nil {
			_ = channel.Close()
		}
	}
	return states, nil
}

// Rates counts the requests for services during a period and returns the requests per second. It has the broker copy
// the requests to a temporary queue, because AMQP offers no other way to count them. So it counts requests and not
// answers, and its user needs the permission to declare queues. While it counts, a request to a service whose last
// replica leaves is not returned but runs into its deadline.
func Rates(
	ctx context.Context, url, exchange string, period time.Duration, names ...string,
) (map[string]float64, error) {
	conn, err := rabbit.Dial(ctx, url, "rpc ls")
	if err != nil {
		return nil, err
	}
	defer conn.HangUp()
	defer context.AfterFunc(ctx, conn.Cut)()
	channel, err := conn.Channel()
	if err != nil {
		return nil, fmt.Errorf("open channel: %w", err)
	}
	queue, err := channel.QueueDeclare("", false, true, true, false, amqp.Table{"x-queue-type": "classic"})
	if err != nil {
		return nil, fmt.Errorf("declare queue: %w", err)
	}
	copies, err := channel.Consume(queue.Name, "", true, true, false, false, nil)
	if err != nil {
		return nil, fmt.Errorf("consume copies: %w", err)
	}
	for _, name := range names {
		if err := channel.QueueBind(queue.Name, name, exchange, false, nil); err != nil {
			return nil, fmt.Errorf("bind to %s: %w", name, err)
		}
	}
	began, end := time.Now(), time.NewTimer(period)
	defer end.Stop()
	rates := map[string]float64{}
	for {
		select {
		case request, open := <-copies:
			if !open {
				return nil, fmt.Errorf("count requests: %w", errDeliveriesEnded)
			}
			rates[request.RoutingKey]++
		case <-end.C:
			for name := range rates {
				rates[name] /= time.Since(began).Seconds()
			}
			return rates, nil
		}
	}
}
