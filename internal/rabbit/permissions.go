package rabbit

import (
	"regexp"
	"slices"
	"strings"
)

// Permissions are a user's permissions in a RabbitMQ vhost: regular expressions for the names that the user may
// configure, write to, and read from.
type Permissions struct {
	Configure string `json:"configure"`
	Write     string `json:"write"`
	Read      string `json:"read"`
	// Topics limits which messages the user may publish. If it is nil, the user may publish all messages to the exchanges
	// that match Write.
	Topics *Topics `json:"topics,omitempty"`
}

// Topics are a user's topic permissions on one topic exchange: regular expressions for the routing keys that the user
// may publish with, and bind queues with.
type Topics struct {
	Exchange string `json:"exchange"`
	Write    string `json:"write"`
	Read     string `json:"read"`
}

// nothing is a regular expression that matches no name.
const nothing = "^$"

// A process checks that the topology exists before it relies on it: without queues a relay would park all its
// messages. Since 4.2.7 and 4.3.1, RabbitMQ lets a user check only objects for which the user has some permission.
// (4.2.6 and 4.3.0 required the permission to configure them.) So each process also has a permission on the other
// side's objects, one that it cannot use: binding and unbinding require both writing to the queue and reading from
// the exchange, and no process has both.

// PublisherPermissions are all that a relay needs if the topology is given: it writes its own packages' messages to the
// exchange and cannot read any messages.
func (t Topology) PublisherPermissions() Permissions {
	p := Permissions{Configure: nothing, Write: Only(append(t.queueNames(), t.Exchange)...), Read: nothing}
	if len(t.Packages) > 0 {
		p.Topics = &Topics{Exchange: t.Exchange, Write: t.ownTypes(), Read: nothing}
	}
	return p
}

// ownTypes returns a regular expression that matches the message types of the service's own packages.
func (t Topology) ownTypes() string {
	return strings.TrimSuffix(Only(t.Packages...), "$") + `\.`
}

// owns reports whether the service may publish messages of a type.
func (t Topology) owns(messageType string) bool {
	return len(t.Packages) == 0 || slices.ContainsFunc(t.Packages, func(name string) bool {
		return strings.HasPrefix(messageType, name+".")
	})
}

// ObserverPermissions are all that reading queue depths needs. Write permission on a queue only allows binding it,
// which also requires read permission on an exchange. So with these permissions alone nothing can be sent or read.
func (t Topology) ObserverPermissions() Permissions {
	return Permissions{Configure: nothing, Write: Only(t.queueNames()...), Read: nothing}
}

// ConsumerPermissions are all that a consumer needs if the topology is given: it reads from its queues and cannot send
// anything. Its handlers send through the outbox.
func (t Topology) ConsumerPermissions() Permissions {
	return Permissions{Configure: nothing, Write: nothing, Read: Only(append(t.queueNames(), t.Exchange)...)}
}

func (t Topology) queueNames() (names []string) {
	for _, queue := range t.Queues {
		names = append(names, queue.Name, DeadQueue(queue.Name))
	}
	return names
}

// Only returns a regular expression that matches exactly these names.
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
