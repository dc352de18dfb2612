package rabbit

import (
	"context"
	"fmt"
	"slices"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
)

// Topology is what a service needs on the broker: it follows from the message types that its consumer groups handle.
// Unless the topology is given, every process declares it on connecting, so there is no topology file and no setup.
type Topology struct {
	// Exchange is the topic exchange that events go to, with the message type as routing key.
	Exchange string
	Queues   []Queue
	// Packages are the protobuf packages of the service's own messages: it may publish these and no others. Empty means
	// that it may publish every message.
	Packages []string
	// Given means that processes do not declare the topology and only check that it exists. They then need no permission
	// to configure.
	Given bool
}

// Queue is the queue of one consumer group.
type Queue struct {
	Name string `json:"name"`
	// Types are the message types that the queue is bound to.
	Types []string `json:"types"`
	// Unordered means that the order of the messages does not matter: all consumers are active at once. In an ordered
	// queue one consumer is active and the others stand by.
	Unordered bool `json:"unordered,omitempty"`
}

// Types returns the message types that a queue is bound to.
func (t Topology) Types() (types []string) {
	for _, queue := range t.Queues {
		types = append(types, queue.Types...)
	}
	return types
}

// DeadQueue is the name of the queue for messages that the broker gave up delivering from the named queue.
func DeadQueue(name string) string { return name + ".dead" }

// deliveryLimit is how often the broker redelivers a message that no consumer acks. It is a last resort: the inbox
// takes over at the third delivery. It is explicit because the default is no limit in RabbitMQ 3 and 20 since 4.0.
const deliveryLimit = 20

// consumerTimeout is RabbitMQ's default for how long a consumer may leave a delivery unacked before the broker requeues
// it.
const consumerTimeout = 30 * time.Minute

// LongestRedelivery is how long the broker keeps delivering a message that consumers take and never ack, before it
// gives the message up. It does not include the time that a message waits in a queue without consumers, which is
// unbounded.
const LongestRedelivery = (deliveryLimit + 1) * consumerTimeout

// queueArguments are the arguments of a group's queue. All are explicit, because their defaults differ between
// versions.
func queueArguments(queue Queue) amqp.Table {
	arguments := amqp.Table{
		// Replicated. The queue confirms a message only when a majority has it on disk.
		"x-queue-type":     "quorum",
		"x-delivery-limit": deliveryLimit,
		// Beyond the limit a message moves to the dead queue, and leaves this queue only when it is safe there. This strategy
		// requires reject-publish, which has no other effect on a queue without a length limit.
		"x-dead-letter-exchange":    "",
		"x-dead-letter-routing-key": DeadQueue(queue.Name),
		"x-dead-letter-strategy":    "at-least-once",
		"x-overflow":                "reject-publish",
	}
	if !queue.Unordered {
		// One consumer at a time: several would handle a key's messages out of order. The others stand by.
		arguments["x-single-active-consumer"] = true
	}
	return arguments
}

// deadDeliveryLimit is effectively no limit. Not every version supports an explicit "no limit".
const deadDeliveryLimit = 1_000_000

// deadQueueArguments make sure that messages leave a dead queue only by an ack, unless a policy says otherwise.
var deadQueueArguments = amqp.Table{
	"x-queue-type": "quorum", "x-delivery-limit": deadDeliveryLimit, "x-overflow": "reject-publish",
}

// declare declares the topology on ch. It is idempotent. It returns an error if a queue exists with other arguments: to
// delete and recreate the queue is a decision about its messages, which declare must not make.
//
// The exchange is declared after the queues: on the first start, an existing exchange means that all queues exist.
func (t Topology) declare(ch *amqp.Channel) error {
	if t.Given {
		return t.expect(ch)
	}
	for _, queue := range t.Queues {
		if err := declareQueue(ch, DeadQueue(queue.Name), deadQueueArguments); err != nil {
			return err
		}
		if err := declareQueue(ch, queue.Name, queueArguments(queue)); err != nil {
			return err
		}
	}
	if err := ch.ExchangeDeclare(t.Exchange, amqp.ExchangeTopic, true, false, false, false, nil); err != nil {
		return fmt.Errorf("declare exchange %s: %w", t.Exchange, err)
	}
	for _, queue := range t.Queues {
		for _, key := range queue.Types {
			if err := ch.QueueBind(queue.Name, key, t.Exchange, false, nil); err != nil {
				return fmt.Errorf("bind queue %s to %s: %w", queue.Name, key, err)
			}
		}
	}
	return nil
}

// expect checks on ch that the topology exists. It needs no permission to configure.
func (t Topology) expect(ch *amqp.Channel) error {
	if err := ch.ExchangeDeclarePassive(t.Exchange, amqp.ExchangeTopic, true, false, false, false, nil); err != nil {
		return checkError("exchange "+t.Exchange, err)
	}
	for _, queue := range t.Queues {
		for _, name := range []string{queue.Name, DeadQueue(queue.Name)} {
			if _, err := ch.QueueDeclarePassive(name, true, false, false, false, nil); err != nil {
				return checkError("queue "+name, brokenOr(name, err))
			}
		}
	}
	return nil
}

// checkError is the error of a failed check for an exchange or a queue. If the object is missing, it says what to do.
func checkError(object string, err error) error {
	if refused(err, amqp.NotFound) {
		const cure = "declare the topology (command topology --declare), or let the processes do so"
		return fmt.Errorf("%s does not exist; %s: %w", object, cure, err)
	}
	return fmt.Errorf("check %s: %w", object, err)
}

// Compare compares the topology with the broker without changing anything. It returns the queues that are missing, and
// those that exist with other arguments.
func (t Topology) Compare(ctx context.Context, url string) (missing, differing []string, err error) {
	conn, err := Dial(ctx, url, "doctor")
	if err != nil {
		return nil, nil, err
	}
	defer conn.HangUp()
	for _, queue := range t.Queues {
		for name, arguments := range map[string]amqp.Table{
			queue.Name:            queueArguments(queue),
			DeadQueue(queue.Name): deadQueueArguments,
		} {
			channel, err := conn.Channel() // a new one each time, because a failure closes it
			if err != nil {
				return nil, nil, fmt.Errorf("open channel: %w", err)
			}
			_, err = channel.QueueDeclarePassive(name, true, false, false, false, nil)
			if refused(err, amqp.NotFound) {
				missing = append(missing, "there is no queue "+name)
				continue
			}
			if err == nil {
				err = declareQueue(channel, name, arguments)
			}
			if refused(err, amqp.PreconditionFailed) {
				differing = append(differing, err.Error())
				continue
			}
			if err != nil {
				return nil, nil, brokenOr(name, err)
			}
		}
	}
	slices.Sort(missing)
	slices.Sort(differing)
	return missing, differing, nil
}

// Version returns the broker's name and version, such as RabbitMQ 4.1.0.
func Version(ctx context.Context, url string) (string, error) {
	conn, err := Dial(ctx, url, "doctor")
	if err != nil {
		return "", err
	}
	defer conn.HangUp()
	return fmt.Sprintf("%v %v", conn.Properties["product"], conn.Properties["version"]), nil
}
