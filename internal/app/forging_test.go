package app

import (
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"example.com/shop/internal/deadletter"
	"example.com/shop/internal/dev/testenv"
	"example.com/shop/internal/postgres"
	amqp "github.com/rabbitmq/amqp091-go"
)

// A message of another service that somebody inserts into this outbox does not reach that service's consumers: the
// broker refuses it, the relay parks it, and all other messages are published.
func TestNoServicePublishesEventsOfAnother(t *testing.T) {
	t.Parallel()
	const foreignType = "billing.v1.InvoicePaid"
	admin := testenv.AMQP(t)
	broker := testenv.Management(t, admin)
	config := probed(Config{PostgresURL: testenv.PostgresURL(t), AMQPURL: admin})
	service := names(t, config)
	config.TopologyGiven = true
	if err := service.topology().Declare(t.Context(), admin); err != nil {
		t.Fatal(err)
	}
	onChannel(t, admin, func(channel *amqp.Channel) error {
		if _, err := channel.QueueDeclare("billing.balances", true, false, false, false, nil); err != nil {
			return err
		}
		return channel.QueueBind("billing.balances", foreignType, config.Exchange, false, nil)
	})
	p := service.permissions()["relay"]
	config.AMQPURL = broker.User(p.Configure, p.Write, p.Read)
	broker.Topics(config.AMQPURL, p.Topics.Exchange, p.Topics.Write, p.Topics.Read)
	for _, messageType := range []string{watchedType, foreignType, watchedType, foreignType, watchedType} {
		commit(t, config.PostgresURL, messageType, nil)
	}
	await(t, "relay", serve(t, RunRelay, config), http.StatusOK)

	db, err := postgres.Open(t.Context(), postgres.Config{URL: config.PostgresURL})
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	testenv.Eventually(t, 30*time.Second, func() error {
		var published, parked int
		err := db.QueryRow(t.Context(), `SELECT published, parked FROM outbox_cursor`).Scan(&published, &parked)
		if err == nil && (published != 3 || parked != 2) {
			err = fmt.Errorf("%d published and %d parked, want 3 and 2", published, parked)
		}
		return err
	})
	letters, err := deadletter.List(t.Context(), db, deadletter.Filter{}, 0, 10)
	if err != nil || len(letters) != 2 {
		t.Fatalf("%d dead letters, %v", len(letters), err)
	}
	for _, letter := range letters {
		if letter.Type != foreignType || letter.Reason != deadletter.Refused ||
			!strings.Contains(letter.Error, foreignType) {
			t.Errorf("got %s, %s: %s", letter.Type, letter.Reason, letter.Error)
		}
	}
	if forged := broker.Get("billing.balances", 10); len(forged) != 0 {
		t.Errorf("the other service has %d forged messages", len(forged))
	}
}

// onChannel runs fn on a channel of its own.
func onChannel(t *testing.T, url string, fn func(*amqp.Channel) error) {
	t.Helper()
	conn, err := amqp.Dial(url)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	channel, err := conn.Channel()
	if err == nil {
		err = fn(channel)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// The packages of a domain are those of its services and those that it lists.
func TestPackagesOfADomain(t *testing.T) {
	t.Parallel()
	config := written(Config{})
	service := config.domain
	config.domain = func(d deps) (domain, error) {
		made, err := service(d)
		made.publishes = []string{"google.protobuf"}
		return made, err
	}
	got := names(t, config).packages()
	for _, want := range []string{"google.protobuf", "probe.durable.v1"} {
		if !slices.Contains(got, want) {
			t.Errorf("got %s without %s", got, want)
		}
	}
}
