package rabbit

import (
	"regexp"
	"strings"
)

// Permissions are what RabbitMQ lets a user do in a vhost: regular expressions of the names that it may configure, write to, and read from.
type Permissions struct {
	Configure string `json:"configure"`
	Write     string `json:"write"`
	Read      string `json:"read"`
}

// nothing is an expression that no name matches.
const nothing = "^$"

// A process looks whether the topology is there before it relies on it: a relay without queues would park all it publishes. Since 4.2.7 and 4.3.1
// RabbitMQ lets a user look at what it has some permission for, and at nothing else. (4.2.6 and 4.3.0 demanded to configure it.) So each process has a
// permission for the other side too, the one of which it can make no use: binding, and unbinding, takes writing to the queue and reading from
// the exchange, and nobody has both.

// PublisherPermissions are all that a relay needs where the topology is given: it writes to the exchange, and can read nobody's messages.
func (t Topology) PublisherPermissions() Permissions {
	return Permissions{Configure: nothing, Write: Only(append(t.queueNames(), t.Exchange)...), Read: nothing}
}

// ObserverPermissions are all that looking at the queues needs. Writing to a queue means binding it, and that takes reading from an exchange, too: so
// with these alone nothing can be sent or read.
func (t Topology) ObserverPermissions() Permissions {
	return Permissions{Configure: nothing, Write: Only(t.queueNames()...), Read: nothing}
}

// ConsumerPermissions are all that a consumer needs where the topology is given: it reads from its queues, and can send nothing. What its handlers
// send goes through the outbox.
func (t Topology) ConsumerPermissions() Permissions {
	return Permissions{Configure: nothing, Write: nothing, Read: Only(append(t.queueNames(), t.Exchange)...)}
}

func (t Topology) queueNames() (names []string) {
	for _, queue := range t.Queues {
		names = append(names, queue.Name, DeadQueue(queue.Name))
	}
	return names
}

// Only returns an expression that these names match and no other.
func Only(names ...string) string {
	if len(names) == 0 {
		return nothing
	}
	quoted := make([]string, len(names))
	for i, name := range names {
		quoted[i] = regexp.QuoteMeta(name)
	}
	return "^(" + strings.Join(quoted, "|") + ")$"
}
