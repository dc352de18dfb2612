package rabbit

import (
	"context"
	"fmt"
	"slices"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
)

// Topology is what a service needs on the broker. It follows from the message types that its consumer groups handle. Unless it is given, every
// process declares it when it connects, so there is no topology file and nothing to set up.
type Topology struct {
	// Exchange is the topic exchange that events go to, with the message type as routing key.
	Exchange string
	Queues   []Queue
	// Given says that somebody else declares it, and processes only look whether it is there: then they need no permission to configure.
	Given bool
}

// Queue is the queue of one consumer group.
type Queue struct {
	Name string `json:"name"`
	// Types are the message types that the queue is bound to.
	Types []string `json:"types"`
	// Unordered says that the order of its messages means nothing: all consumers work on it at once, instead of one with the others standing by.
	Unordered bool `json:"unordered,omitempty"`
}

// DeadQueue is the name of the queue that takes what the broker gave up delivering from a queue.
func DeadQueue(name string) string { return name + ".dead" }

// deliveryLimit is how often the broker hands out a message that nobody acks. It is a last resort: the inbox takes over at the
// third delivery. Explicit, because the default is none in RabbitMQ 3 and 20 since 4.0.
const deliveryLimit = 20

// consumerTimeout is RabbitMQ's own default of how long a consumer may keep a delivery before the broker takes it back.
const consumerTimeout = 30 * time.Minute

// LongestRedelivery is how long the broker goes on handing out a message that consumers take and never ack, until it gives it up. How long a message
// stands in a queue whose consumers are away is not in it: nothing bounds that.
const LongestRedelivery = (deliveryLimit + 1) * consumerTimeout

// queueArguments are the arguments of a group's queue, all of them explicit, since their defaults differ between versions.
func queueArguments(queue Queue) amqp.Table {
	arguments := amqp.Table{
		// Replicated, and confirmed only when a majority has it on disk.
		"x-queue-type":     "quorum",
		"x-delivery-limit": deliveryLimit,
		// Beyond the limit a message moves to the dead queue, and leaves this one only when it is safe there. That strategy demands
		// reject-publish, which has no other effect on a queue without a length limit.
		"x-dead-letter-exchange":    "",
		"x-dead-letter-routing-key": DeadQueue(queue.Name),
		"x-dead-letter-strategy":    "at-least-once",
		"x-overflow":                "reject-publish",
	}
	if !queue.Unordered {
		// One consumer at a time: with several, a key's messages would be handled out of order. The others stand by.
		arguments["x-single-active-consumer"] = true
	}
	return arguments
}

// deadDeliveryLimit is as good as none, which not every version has.
const deadDeliveryLimit = 1_000_000

// deadQueueArguments: nothing leaves a dead queue but by an ack, unless a policy says otherwise.
var deadQueueArguments = amqp.Table{"x-queue-type": "quorum", "x-delivery-limit": deadDeliveryLimit, "x-overflow": "reject-publish"}

// declare makes the topology on ch. All of it is idempotent. A queue that exists with other arguments is an error that says so:
// deleting and making it anew is a decision about its messages, and not ours.
//
// The exchange comes after the queues: at a first start, one that is there tells that all queues are.
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

// expect looks for the topology on ch. It takes no permissions.
func (t Topology) expect(ch *amqp.Channel) error {
	if err := ch.ExchangeDeclarePassive(t.Exchange, amqp.ExchangeTopic, true, false, false, false, nil); err != nil {
		return unexpected("exchange "+t.Exchange, err)
	}
	for _, queue := range t.Queues {
		for _, name := range []string{queue.Name, DeadQueue(queue.Name)} {
			if _, err := ch.QueueDeclarePassive(name, true, false, false, false, nil); err != nil {
				return unexpected("queue "+name, brokenOr(name, err))
			}
		}
	}
	return nil
}

// unexpected says of something that cannot be looked at what to do about it.
func unexpected(what string, err error) error {
	if refused(err, amqp.NotFound) {
		const cure = "declare the topology (command topology --declare), or let the processes do so"
		return fmt.Errorf("%s is not there; %s: %w", what, cure, err)
	}
	return fmt.Errorf("look at %s: %w", what, err)
}

// Compare looks at the broker without changing anything, and returns what of the topology is missing there, and which
// queues are there with other arguments.
func (t Topology) Compare(ctx context.Context, url string) (missing, differing []string, err error) {
	conn, err := Dial(ctx, url, "doctor")
	if err != nil {
		return nil, nil, err
	}
	defer conn.HangUp()
	for _, queue := range t.Queues {
		for name, arguments := range map[string]amqp.Table{queue.Name: queueArguments(queue), DeadQueue(queue.Name): deadQueueArguments} {
			channel, err := conn.Channel() // a failure closes it
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
