//go:build unix

package testenv

import (
	"context"
	"crypto/rand"
	"errors"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"testing"

	amqp "github.com/rabbitmq/amqp091-go"
)

// AMQP returns the URL of a new RabbitMQ vhost that is the test's own. It is
// deleted when the test ends, after its queues and with all its connections.
func AMQP(t testing.TB) string {
	t.Helper()
	e := shared(t)
	vhost := uniqueName(t)
	ctx, cancel := context.WithTimeout(t.Context(), callPatience)
	defer cancel()
	if err := e.management.call(ctx, http.MethodPut, nil, nil, "vhosts", vhost); err != nil {
		t.Fatalf("create vhost: %v", err)
	}
	t.Cleanup(func() {
		ctx, cancel := cleanupContext()
		defer cancel()
		if err := e.management.deleteVhost(ctx, vhost); err != nil {
			t.Errorf("delete vhost: %v", err)
		}
	})
	broker, err := url.Parse(e.stack.AMQPURL)
	if err != nil {
		t.Fatalf("parse AMQP_URL: %v", err)
	}
	all := map[string]string{"configure": ".*", "write": ".*", "read": ".*"}
	if err := e.management.call(ctx, http.MethodPut, all, nil, "permissions", vhost, broker.User.Username()); err != nil {
		t.Fatalf("grant permissions: %v", err)
	}
	broker.Path = "/" + vhost
	return broker.String()
}

// Queue is what the management API says about a queue. Counts are up to two
// seconds old.
type Queue struct {
	Name      string         `json:"name"`
	Type      string         `json:"type"` // classic, quorum or stream
	Durable   bool           `json:"durable"`
	Arguments map[string]any `json:"arguments"`
	Messages  int            `json:"messages"` // ready and unacknowledged
	Ready     int            `json:"messages_ready"`
	Unacked   int            `json:"messages_unacknowledged"`
	Consumers int            `json:"consumers"`
}

// Message is a message that Get took from a queue.
type Message struct {
	Exchange   string `json:"exchange"`
	RoutingKey string `json:"routing_key"`
	Payload    string `json:"payload"` // base64 if Encoding says so
	Encoding   string `json:"payload_encoding"`
	Properties struct {
		MessageID   string         `json:"message_id"`
		Type        string         `json:"type"`
		ContentType string         `json:"content_type"`
		Headers     map[string]any `json:"headers"`
	} `json:"properties"`
}

// ManagementClient does to one vhost what operators and accidents do. Its methods
// fail the test on any error and must be called from the test's goroutine.
type ManagementClient struct {
	t     testing.TB
	api   *management
	vhost string
}

// Management returns a client for the vhost of a URL that AMQP returned.
func Management(t testing.TB, amqpURL string) *ManagementClient {
	t.Helper()
	parsed, err := url.Parse(amqpURL)
	if err != nil {
		t.Fatalf("parse amqp url: %v", err)
	}
	return &ManagementClient{t: t, api: shared(t).management, vhost: strings.TrimPrefix(parsed.Path, "/")}
}

// User makes a user who may do so much in the vhost, each of it for the names that match an expression, and returns the URL that it connects with.
func (c *ManagementClient) User(configure, write, read string) (amqpURL string) {
	c.t.Helper()
	name, password := uniqueName(c.t), rand.Text()
	c.must("make user", c.try(http.MethodPut, map[string]string{"password": password, "tags": ""}, nil, "users", name))
	c.deleteUser(name)
	permissions := map[string]string{"configure": configure, "write": write, "read": read}
	c.must("grant permissions", c.try(http.MethodPut, permissions, nil, "permissions", c.vhost, name))
	broker, err := url.Parse(shared(c.t).stack.AMQPURL)
	c.must("parse AMQP_URL", err)
	broker.User, broker.Path = url.UserPassword(name, password), "/"+c.vhost
	return broker.String()
}

// Users returns what users may do in the vhost whose names begin with prefix: expressions of what each may configure,
// write and read, by the name's rest. They are deleted when the test ends.
func (c *ManagementClient) Users(prefix string) map[string][3]string {
	c.t.Helper()
	var all []struct{ User, Configure, Write, Read string }
	c.must("read permissions", c.try(http.MethodGet, nil, &all, "vhosts", c.vhost, "permissions"))
	found := map[string][3]string{}
	for _, one := range all {
		rest, ok := strings.CutPrefix(one.User, prefix)
		if !ok {
			continue
		}
		found[rest] = [3]string{one.Configure, one.Write, one.Read}
		c.deleteUser(one.User)
	}
	return found
}

// deleteUser deletes a user when the test ends.
func (c *ManagementClient) deleteUser(name string) {
	c.t.Cleanup(func() {
		ctx, cancel := cleanupContext()
		defer cancel()
		if err := c.api.call(ctx, http.MethodDelete, nil, nil, "users", name); err != nil {
			c.t.Errorf("delete user: %v", err)
		}
	})
}

// sizes are larger than what brokers take: ours for tests, RabbitMQ from version 4 on, and before.
var sizes = []int{513 << 10, 16<<20 + 1, 128<<20 + 1}

// oversized is found once for all tests of a binary.
var oversized struct {
	sync.Once
	size int
}

// Oversized returns the size of a message that is too large for the broker, in bytes. No API says how much it takes.
func Oversized(t testing.TB) int {
	t.Helper()
	url := AMQP(t)
	oversized.Do(func() {
		for _, size := range sizes {
			refused, err := refuses(url, size)
			if err != nil {
				t.Fatal(err)
			}
			if refused {
				oversized.size = size
				return
			}
		}
	})
	if oversized.size == 0 {
		t.Fatalf("the broker takes a message of %d bytes", sizes[len(sizes)-1])
	}
	return oversized.size
}

// refuses tries a message of so many bytes, which has no queue to go to.
func refuses(url string, size int) (refused bool, err error) {
	conn, err := amqp.Dial(url)
	if err != nil {
		return false, err
	}
	defer func() { err = errors.Join(err, conn.Close()) }()
	channel, err := conn.Channel()
	if err != nil {
		return false, err
	}
	if err := channel.Confirm(false); err != nil {
		return false, err
	}
	closed, done := channel.NotifyClose(make(chan *amqp.Error, 1)), make(chan struct{})
	confirm, err := channel.PublishWithDeferredConfirm("", "nobody", false, false, amqp.Publishing{Body: make([]byte, size)})
	if err != nil {
		return false, err
	}
	go func() { confirm.Wait(); close(done) }()
	select {
	case refusal := <-closed:
		return refusal != nil && refusal.Code == amqp.PreconditionFailed, nil
	case <-done:
		return !confirm.Acked(), nil
	}
}

// CloseConnections closes all connections to the vhost from the broker's side, as
// an operator would, and returns how many. It waits for the first one to show up,
// since the API learns of connections a moment after their clients do.
func (c *ManagementClient) CloseConnections() int {
	c.t.Helper()
	var connections []struct {
		Name string `json:"name"`
	}
	Eventually(c.t, callPatience, func() error {
		connections = nil
		if err := c.try(http.MethodGet, nil, &connections, "vhosts", c.vhost, "connections"); err != nil {
			return err
		}
		if len(connections) == 0 {
			return errNoConnections
		}
		return nil
	})
	for _, connection := range connections {
		if err := c.try(http.MethodDelete, nil, nil, "connections", connection.Name); !isNotFound(err) && err != nil {
			c.t.Fatalf("close connection: %v", err)
		}
	}
	return len(connections)
}

// Queue returns a queue; ok is false if there is none of this name.
func (c *ManagementClient) Queue(name string) (queue Queue, ok bool) {
	c.t.Helper()
	err := c.try(http.MethodGet, nil, &queue, "queues", c.vhost, name)
	if isNotFound(err) {
		return Queue{}, false
	}
	c.must("read queue", err)
	return queue, true
}

// Get takes up to max messages from a queue, for good. Unlike counts it is exact.
func (c *ManagementClient) Get(queue string, max int) []Message {
	c.t.Helper()
	request := map[string]any{"count": max, "ackmode": "ack_requeue_false", "encoding": "auto"}
	var messages []Message
	c.must("get messages", c.try(http.MethodPost, request, &messages, "queues", c.vhost, queue, "get"))
	return messages
}

// Purge removes the messages that are ready in a queue.
func (c *ManagementClient) Purge(queue string) {
	c.t.Helper()
	c.must("purge queue", c.try(http.MethodDelete, nil, nil, "queues", c.vhost, queue, "contents"))
}

// DeleteQueue deletes a queue, used or not.
func (c *ManagementClient) DeleteQueue(name string) {
	c.t.Helper()
	c.must("delete queue", c.try(http.MethodDelete, nil, nil, "queues", c.vhost, name))
}

// DeleteExchange deletes an exchange, used or not.
func (c *ManagementClient) DeleteExchange(name string) {
	c.t.Helper()
	c.must("delete exchange", c.try(http.MethodDelete, nil, nil, "exchanges", c.vhost, name))
}

// Policy makes a policy for the queues whose names match an expression, or with operator given an operator policy.
func (c *ManagementClient) Policy(name, pattern string, definition map[string]any, operator bool) {
	c.t.Helper()
	kind := "policies"
	if operator {
		kind = "operator-policies"
	}
	policy := map[string]any{"pattern": pattern, "definition": definition, "apply-to": "queues"}
	c.must("make policy", c.try(http.MethodPut, policy, nil, kind, c.vhost, name))
}

// URL returns the API's URL, with credentials.
func (c *ManagementClient) URL() string { return c.api.base.String() }

func (c *ManagementClient) must(what string, err error) {
	c.t.Helper()
	if err != nil {
		c.t.Fatalf("%s: %v", what, err)
	}
}

func (c *ManagementClient) try(method string, body, result any, path ...string) error {
	ctx, cancel := context.WithTimeout(c.t.Context(), callPatience)
	defer cancel()
	return c.api.call(ctx, method, body, result, path...)
}
