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

// AMQP returns the URL of a new RabbitMQ vhost for the test. When the test ends, it
// deletes the queues and then the vhost, which closes all connections to it.
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
	if err := e.management.call(ctx, http.MethodPut, all, nil, "permissions", vhost,
		broker.User.Username()); err != nil {
		t.Fatalf("grant permissions: %v", err)
	}
	broker.Path = "/" + vhost
	return broker.String()
}

// Queue is a queue as the management API reports it. Counts are up to two seconds old.
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

// ManagementClient operates on a vhost as operators and accidents do. Its methods fail
// the test on any error and must be called from the test's goroutine.
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

// User creates a user and returns its URL. Each permission in the vhost is an expression that matches names.
func (c *ManagementClient) User(configure, write, read string) (amqpURL string) {
	c.t.Helper()
	name, password := uniqueName(c.t), rand.Text()
	user := map[string]string{"password": password, "tags": ""}
	c.must("create user", c.try(http.MethodPut, user, nil, "users", name))
	c.deleteUser(name)
	permissions := map[string]string{"configure": configure, "write": write, "read": read}
	c.must("grant permissions", c.try(http.MethodPut, permissions, nil, "permissions", c.vhost, name))
	broker, err := url.Parse(shared(c.t).stack.AMQPURL)
	c.must("parse AMQP_URL", err)
	broker.User, broker.Path = url.UserPassword(name, password), "/"+c.vhost
	return broker.String()
}

// Topics limits a user, whose URL User returned, to publishing to a topic exchange with routing keys that match write,
// and to binding queues to it with those that match read.
func (c *ManagementClient) Topics(userURL, exchange, write, read string) {
	c.t.Helper()
	user, err := url.Parse(userURL)
	c.must("parse the user's URL", err)
	permissions := map[string]string{"exchange": exchange, "write": write, "read": read}
	c.must("set topic permissions",
		c.try(http.MethodPut, permissions, nil, "topic-permissions", c.vhost, user.User.Username()))
}

// Users returns the permissions in the vhost of users whose names begin with prefix: the expressions for configure,
// write and read by the rest of the name. It deletes these users when the test ends.
func (c *ManagementClient) Users(prefix string) map[string][3]string {
	c.t.Helper()
	var all []struct{ User, Configure, Write, Read string }
	c.must("read permissions", c.try(http.MethodGet, nil, &all, "vhosts", c.vhost, "permissions"))
	found := map[string][3]string{}
	for _, permission := range all {
		rest, ok := strings.CutPrefix(permission.User, prefix)
		if !ok {
			continue
		}
		found[rest] = [3]string{permission.Configure, permission.Write, permission.Read}
		c.deleteUser(permission.User)
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

// sizes lists sizes just above the limits of brokers: our test broker, RabbitMQ from version 4 on, and older versions.
var sizes = []int{513 << 10, 16<<20 + 1, 128<<20 + 1}

// oversized is determined once for all tests of a binary.
var oversized struct {
	sync.Once
	size int
}

// Oversized returns the size in bytes of a message that is too large for the broker. No API reports the limit.
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
		t.Fatalf("the broker accepts a message of %d bytes", sizes[len(sizes)-1])
	}
	return oversized.size
}

// refuses publishes an unroutable message of this size in bytes.
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
	message := amqp.Publishing{Body: make([]byte, size)}
	confirm, err := channel.PublishWithDeferredConfirm("", "nobody", false, false, message)
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

// CloseConnections closes all connections to the vhost on the broker's side, as an
// operator would, and returns their number. It waits for the first one to be listed,
// because the API lists connections with a delay.
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

// Queue returns a queue. ok is false if it does not exist.
func (c *ManagementClient) Queue(name string) (queue Queue, ok bool) {
	c.t.Helper()
	err := c.try(http.MethodGet, nil, &queue, "queues", c.vhost, name)
	if isNotFound(err) {
		return Queue{}, false
	}
	c.must("read queue", err)
	return queue, true
}

// Get removes up to max messages from a queue. Unlike counts it is exact.
func (c *ManagementClient) Get(queue string, max int) []Message {
	c.t.Helper()
	request := map[string]any{"count": max, "ackmode": "ack_requeue_false", "encoding": "auto"}
	var messages []Message
	c.must("get messages", c.try(http.MethodPost, request, &messages, "queues", c.vhost, queue, "get"))
	return messages
}

// Purge removes the ready messages of a queue.
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

// Policy creates a policy, or an operator policy, for the queues whose names match an expression.
func (c *ManagementClient) Policy(name, pattern string, definition map[string]any, operator bool) {
	c.t.Helper()
	kind := "policies"
	if operator {
		kind = "operator-policies"
	}
	policy := map[string]any{"pattern": pattern, "definition": definition, "apply-to": "queues"}
	c.must("create policy", c.try(http.MethodPut, policy, nil, kind, c.vhost, name))
}

// URL returns the API's URL, with credentials.
func (c *ManagementClient) URL() string { return c.api.base.String() }

func (c *ManagementClient) must(action string, err error) {
	c.t.Helper()
	if err != nil {
		c.t.Fatalf("%s: %v", action, err)
	}
}

func (c *ManagementClient) try(method string, body, result any, path ...string) error {
	ctx, cancel := context.WithTimeout(c.t.Context(), callPatience)
	defer cancel()
	return c.api.call(ctx, method, body, result, path...)
}
