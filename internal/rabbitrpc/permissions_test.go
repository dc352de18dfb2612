package rabbitrpc_test

import (
	"errors"
	"testing"

	"example.com/shop/internal/dev/testenv"
	"example.com/shop/internal/rabbit"
	"example.com/shop/internal/rabbitrpc"
	amqp "github.com/rabbitmq/amqp091-go"
)

// Both sides can do their work with the documented permissions, and a client can do nothing else: it can neither
// serve, nor read other clients' requests, nor answer in place of a server without knowing a call's address and ID.
func TestPermissions(t *testing.T) {
	t.Parallel()
	admin := testenv.AMQP(t)
	user := func(p rabbit.Permissions) string {
		return testenv.Management(t, admin).User(p.Configure, p.Write, p.Read)
	}
	server := user(rabbitrpc.ServerPermissions(rabbitrpc.DefaultExchange, "probe.v1.Probe"))
	serve(t, rabbitrpc.ServerConfig{URL: server}, register(again, echo))
	url := user(rabbitrpc.ClientPermissions(rabbitrpc.DefaultExchange))
	if _, err := call(t.Context(), newClient(t, url), again, "hello"); err != nil {
		t.Error(err)
	}
	for name, attempt := range map[string]func(*amqp.Channel) error{
		"consume requests": func(ch *amqp.Channel) error {
			_, err := ch.Consume("probe.v1.Probe", "", true, false, false, false, nil)
			return err
		},
		"declare a queue": func(ch *amqp.Channel) error {
			_, err := ch.QueueDeclare("", false, true, true, false, nil)
			return err
		},
		"bind a queue": func(ch *amqp.Channel) error {
			return ch.QueueBind("probe.v1.Probe", "x", rabbitrpc.DefaultExchange, false, nil)
		},
		"publish to a queue": func(ch *amqp.Channel) error {
			closed := ch.NotifyClose(make(chan *amqp.Error, 1))
			if err := ch.Publish("", "probe.v1.Probe", true, false, amqp.Publishing{}); err != nil {
				return err
			}
			return receive(t, closed)
		},
	} {
		var refused *amqp.Error
		if err := attempt(raw(t, url)); !errors.As(err, &refused) || refused.Code != amqp.AccessRefused {
			t.Errorf("%s: %v", name, err)
		}
	}
}
