package rabbit

import (
	"context"
	"errors"
	"strings"
	"testing"

	"example.com/shop/internal/dev/testenv"
	"example.com/shop/internal/messaging"
	amqp "github.com/rabbitmq/amqp091-go"
)

// With the permissions that it is given, each process can do its work and is refused everything else.
func TestPermissions(t *testing.T) {
	t.Parallel()
	admin := testenv.AMQP(t)
	given := topology
	if err := given.Declare(t.Context(), admin); err != nil {
		t.Fatal(err)
	}
	given.Given = true
	user := func(p Permissions) string { return testenv.Management(t, admin).User(p.Configure, p.Write, p.Read) }
	relay, consumer := user(given.PublisherPermissions()), user(given.ConsumerPermissions())
	observer := user(given.ObserverPermissions())

	t.Run("AreEnoughForTheWork", func(t *testing.T) {
		mustPublish(t, newPublisher(t, PublisherConfig{URL: relay, Topology: given}), text("k", "a"))
		handled := make(chan messaging.Delivery, 1)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		config := ConsumerConfig{URL: consumer, Topology: given, Queue: queue}
		running := NewConsumer(config, func(_ context.Context, batch []messaging.Delivery) error {
			handled <- batch[0]
			return nil
		})
		go func() { done <- running.Run(ctx) }()
		if got := receive(t, handled); got.Key != "k" {
			t.Errorf("got %+v", got)
		}
		cancel()
		if err := receive(t, done); err != nil {
			t.Error(err)
		}
		gauge := NewGauge(observer, "test")
		defer gauge.Close()
		if depths, err := gauge.Read(t.Context(), []string{queue}); err != nil || depths[0].Missing {
			t.Errorf("got %v, %v", depths, err)
		}
	})

	publish := func(exchange, key string) func(*amqp.Channel) error {
		return func(ch *amqp.Channel) error {
			if err := ch.Confirm(false); err != nil {
				return err
			}
			closed := ch.NotifyClose(make(chan *amqp.Error, 1))
			confirm, err := ch.PublishWithDeferredConfirm(exchange, key, false, false,
				amqp.Publishing{MessageId: "forged"})
			if err != nil {
				return err
			}
			select {
			case err := <-closed:
				return err
			case <-confirm.Done():
				if confirm.Acked() {
					return nil
				}
				return <-closed
			}
		}
	}
	consume := func(ch *amqp.Channel) error {
		_, err := ch.Consume(queue, "", false, false, false, false, nil)
		return err
	}
	declare := func(ch *amqp.Channel) error { return topology.declare(ch) }
	purge := func(ch *amqp.Channel) error { _, err := ch.QueuePurge(queue, false); return err }
	remove := func(ch *amqp.Channel) error { _, err := ch.QueueDelete(queue, false, false, false); return err }
	removeExchange := func(ch *amqp.Channel) error { return ch.ExchangeDelete(exchange, false, false) }
	own := func(ch *amqp.Channel) error {
		_, err := ch.QueueDeclare("own", true, false, false, false, nil)
		return err
	}
	bind := func(ch *amqp.Channel) error { return ch.QueueBind(queue, "#", exchange, false, nil) }
	unbind := func(ch *amqp.Channel) error { return ch.QueueUnbind(queue, topology.Queues[0].Types[0], exchange, nil) }
	consumerOf := func(name string) string { return user(Topology{Queues: []Queue{{Name: name}}}.ConsumerPermissions()) }
	for name, test := range map[string]struct {
		url     string
		attempt func(*amqp.Channel) error
	}{
		"RelayConsumes":                   {relay, consume},
		"RelayPurges":                     {relay, purge},
		"RelayDeclares":                   {relay, declare},
		"RelayDeclaresAnotherQueue":       {relay, own},
		"RelayBinds":                      {relay, bind},
		"RelayUnbinds":                    {relay, unbind},
		"RelayDeletesTheQueue":            {relay, remove},
		"RelayDeletesTheExchange":         {relay, removeExchange},
		"RelayWritesToAQueue":             {relay, publish("", queue)},
		"RelayWritesToAnotherExchange":    {relay, publish("amq.topic", "any")},
		"ConsumerWrites":                  {consumer, publish(exchange, "any")},
		"ConsumerWritesToAQueue":          {consumer, publish("", queue)},
		"ConsumerDeclares":                {consumer, declare},
		"ConsumerDeclaresAnotherQueue":    {consumer, own},
		"ConsumerBinds":                   {consumer, bind},
		"ConsumerUnbinds":                 {consumer, unbind},
		"ConsumerDeletesTheQueue":         {consumer, remove},
		"ConsumerDeletesTheExchange":      {consumer, removeExchange},
		"ObserverConsumes":                {observer, consume},
		"ObserverPurges":                  {observer, purge},
		"ObserverWrites":                  {observer, publish(exchange, "any")},
		"ObserverWritesToAQueue":          {observer, publish("", queue)},
		"ObserverDeclares":                {observer, declare},
		"ObserverBinds":                   {observer, bind},
		"ObserverUnbinds":                 {observer, unbind},
		"ObserverDeletesTheQueue":         {observer, remove},
		"ConsumerReadsAnotherQueue":       {consumerOf("other"), consume},
		"ConsumerReadsASimilarlyNamedOne": {consumerOf(queue[:len(queue)-1]), consume},
	} {
		t.Run(name, func(t *testing.T) {
			err := test.attempt(raw(t, test.url))
			var refused *amqp.Error
			if !errors.As(err, &refused) || refused.Code != amqp.AccessRefused {
				t.Errorf("not refused: %v", err)
			}
		})
	}

	t.Run("AMissingExchangeIsNamed", func(t *testing.T) {
		url := testenv.AMQP(t)
		_, err := newPublisher(t, PublisherConfig{URL: url, Topology: given}).Publish(t.Context(), texts(0, 1))
		if err == nil || !strings.Contains(err.Error(), "exchange "+exchange+" does not exist; declare the topology") {
			t.Errorf("got %v", err)
		}
	})
}
