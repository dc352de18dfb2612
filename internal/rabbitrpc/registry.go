package rabbitrpc

import (
	"context"
	"fmt"
	"time"

	"example.com/shop/internal/rabbit"
	amqp "github.com/rabbitmq/amqp091-go"
)

// ServerPermissions are all that a server of these services needs. It makes their queues and, the first one, the exchange; and it writes to
// the default exchange, since that is where replies go. The broker lets that mean any queue, and the server itself sees to it that it does not.
func ServerPermissions(exchange string, services ...string) rabbit.Permissions {
	own := rabbit.Only(append([]string{exchange}, services...)...)
	return rabbit.Permissions{Configure: own, Write: rabbit.Only(append([]string{"amq.default"}, services...)...), Read: own}
}

// ClientPermissions are all that a client needs: it may ask for everything, and read nobody's messages. The replies are its own.
func ClientPermissions(exchange string) rabbit.Permissions {
	return rabbit.Permissions{Configure: rabbit.Only(), Write: rabbit.Only(exchange), Read: rabbit.Only()}
}

// ServiceState is what the broker says about a service.
type ServiceState struct {
	Name string
	// Replicas is how many servers consume its queue. 0 means that calls end with unavailable.
	Replicas int
	// Waiting is how many requests no server has taken on.
	Waiting int
}

// Look asks the broker about services by their full names, in this order. It changes nothing. Since 4.2.7 RabbitMQ answers
// only a user who has some permission for the queues.
func Look(ctx context.Context, url string, names ...string) ([]ServiceState, error) {
	conn, err := rabbit.Dial(ctx, url, "rpc ls")
	if err != nil {
		return nil, err
	}
	defer conn.HangUp()
	defer context.AfterFunc(ctx, conn.Cut)()
	states := make([]ServiceState, len(names))
	for i, name := range names {
		channel, err := conn.Channel() // a queue that is not there closes it
		if err != nil {
			return nil, fmt.Errorf("open channel: %w", err)
		}
		queue, err := channel.QueueDeclarePassive(name, true, true, false, false, nil)
		if err != nil && !isNotFound(err) {
			return nil, fmt.Errorf("look at queue %s: %w", name, err)
		}
		states[i] = ServiceState{Name: name, Replicas: queue.Consumers, Waiting: queue.Messages}
		if err == nil {
			_ = channel.Close()
		}
	}
	return states, nil
}

// Rates counts the requests that come in for services during a period, and returns them per second. It has the broker send copies to
// a queue of its own, without which AMQP has no means to tell. So it counts what is asked and not what is answered, its user must be allowed
// to declare queues, and while it counts, a request to a service whose last replica leaves is not returned but waits for its deadline.
func Rates(ctx context.Context, url, exchange string, period time.Duration, names ...string) (map[string]float64, error) {
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
