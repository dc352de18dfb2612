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
	"example.com/shop/internal/outbox"
	"example.com/shop/internal/postgres"
	"example.com/shop/internal/rabbit"
	amqp "github.com/rabbitmq/amqp091-go"
)

// nobodysType is a type that no group handles. Its proto file does not say that it must be heard.
const nobodysType = "google.protobuf.BytesValue"

// An event without a subscriber is no dead letter, and can be replayed to a later one. A lost binding of one of the
// service's own groups makes dead letters, and so does a misspelled type.
func TestEventsThatNobodyNeedsToHear(t *testing.T) {
	t.Parallel()
	config := probed(Config{PostgresURL: testenv.PostgresURL(t), AMQPURL: testenv.AMQP(t)})
	relay := start(t, RunRelay, config)
	await(t, "relay", relay.ready, http.StatusOK)
	commit(t, config.PostgresURL, nobodysType, nil)
	awaitMetric(t, relay, "outbox_unheard_total", "1")

	broker := testenv.Management(t, config.AMQPURL)
	if _, exists := broker.Queue(probeQueue); !exists {
		t.Fatal("the relay has not declared the queue")
	}
	onChannel(t, config.AMQPURL, func(channel *amqp.Channel) error {
		return channel.QueueUnbind(probeQueue, watchedType, config.Exchange, nil)
	})
	commit(t, config.PostgresURL, watchedType, nil)
	commit(t, config.PostgresURL, "google.protobuf.ByteValue", nil)
	commit(t, config.PostgresURL, nobodysType, nil)
	awaitMetric(t, relay, "outbox_unheard_total", "2")
	db, err := postgres.Open(t.Context(), postgres.Config{URL: config.PostgresURL})
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	letters, err := deadletter.List(t.Context(), db, deadletter.Filter{}, 0, 10)
	var types []string
	for _, letter := range letters {
		types = append(types, letter.Type)
	}
	slices.Sort(types)
	if want := []string{"google.protobuf.ByteValue", watchedType}; err != nil || !slices.Equal(types, want) {
		t.Errorf("dead letters of %v, %v, want %v", types, err, want)
	}

	onChannel(t, config.AMQPURL, func(channel *amqp.Channel) error {
		if _, err := channel.QueueDeclare("later", true, false, false, false, nil); err != nil {
			return err
		}
		return channel.QueueBind("later", nobodysType, config.Exchange, false, nil)
	})
	publisher := rabbit.NewPublisher(rabbit.PublisherConfig{
		URL: config.AMQPURL, Topology: rabbit.Topology{Exchange: config.Exchange}, Name: "replay",
	})
	defer publisher.Close()
	filter := outbox.ReplayFilter{Types: []string{nobodysType}}
	done, err := outbox.Replay(t.Context(), db, publisher, filter, 1000, nil)
	if err != nil || done.Published != 2 || done.Unroutable != 0 || len(broker.Get("later", 10)) != 2 {
		t.Errorf("replayed %+v, %v", done, err)
	}
}

// awaitMetric waits until a metric without labels of its own has a value.
func awaitMetric(t *testing.T, process *started, name, value string) {
	t.Helper()
	testenv.Eventually(t, 30*time.Second, func() error {
		text, _ := scrape(t, process.ops)
		for line := range strings.Lines(text) {
			if strings.HasPrefix(line, name) && strings.HasSuffix(line, " "+value+"\n") {
				return nil
			}
		}
		return fmt.Errorf("%s is not %s", name, value)
	})
}
