package app

import (
	"net/http"
	"testing"
	"time"

	"example.com/orders/internal/messaging"
	"example.com/orders/internal/outbox"
	"example.com/orders/internal/postgres"
	"example.com/orders/internal/rabbit"
	"example.com/orders/internal/testenv"
	"github.com/jackc/pgx/v5"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// Each process does its work with its own role in the database, and with no more permissions on the broker than it says it needs.
func TestLeastPrivilege(t *testing.T) {
	t.Parallel()
	postgresURL, admin := testenv.PostgresURL(t), testenv.AMQP(t)
	topology := Topology("events")
	if err := topology.Declare(t.Context(), admin); err != nil {
		t.Fatal(err)
	}
	config := func(role string, permissions rabbit.Permissions) Config {
		return Config{
			PostgresURL: testenv.As(t, postgresURL, role), Exchange: "events", TopologyGiven: true,
			AMQPURL: testenv.Management(t, admin).User(permissions.Configure, permissions.Write, permissions.Read),
		}
	}
	api := config("app_api", rabbit.Permissions{})
	await(t, "api", serve(t, RunAPI, api), http.StatusOK)
	await(t, "relay", serve(t, RunRelay, config("app_relay", topology.PublisherPermissions())), http.StatusOK)
	await(t, "consumer", serve(t, RunConsumer, config("app_consumer", topology.ConsumerPermissions())), http.StatusOK)

	// A message that no handler can read: the relay publishes it, the consumer makes a dead letter of it.
	kind := topology.Queues[0].Types[0]
	db, err := postgres.Open(t.Context(), postgres.Config{URL: api.PostgresURL})
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	message := messaging.New("key", wrapperspb.String("text"))
	message.Type, message.Payload = kind, []byte{0xff}
	if err := outbox.NewWriter(db, nil, nil).Transact(t.Context(), func(tx pgx.Tx) error { return outbox.Insert(t.Context(), tx, message) }); err != nil {
		t.Fatal(err)
	}
	operator, err := postgres.Open(t.Context(), postgres.Config{URL: testenv.As(t, postgresURL, "app_operator")})
	if err != nil {
		t.Fatal(err)
	}
	defer operator.Close()
	testenv.Eventually(t, 20*time.Second, func() error {
		var consumer, reason string
		err := operator.QueryRow(t.Context(), `SELECT consumer, reason FROM dead_letter WHERE message_id = $1`, message.ID.String()).Scan(&consumer, &reason)
		if err == nil && (consumer == "" || reason != "undecodable") {
			t.Fatalf("a letter of %q for %s", consumer, reason)
		}
		return err
	})
	var published int
	if err := operator.QueryRow(t.Context(), `SELECT sum(published) FROM outbox_cursor`).Scan(&published); err != nil || published > 1 {
		t.Errorf("published %d, %v", published, err)
	}
}
