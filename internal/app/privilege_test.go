package app

import (
	"net/http"
	"testing"
	"time"

	"connectrpc.com/connect/v2"
	"example.com/shop/internal/dev/testenv"
	operationsv1 "example.com/shop/internal/gen/shop/operations/v1"
	"example.com/shop/internal/gen/shop/operations/v1/operationsv1connect"
	"example.com/shop/internal/postgres"
	"example.com/shop/internal/rabbitrpc"
)

// Each process works with its own role in the database, and with exactly its permissions on the broker.
func TestLeastPrivilege(t *testing.T) {
	t.Parallel()
	owner, admin := testenv.Postgres(t), testenv.AMQP(t)
	awaitEffects := effectsIn(t, owner)
	domain := probed(Config{}).domain(nil, nil, nil)
	if err := domain.topology("events").Declare(t.Context(), admin); err != nil {
		t.Fatal(err)
	}
	permissions := domain.permissions("events")
	user := func(name string) string {
		p := permissions[name]
		return testenv.Management(t, admin).User(p.Configure, p.Write, p.Read)
	}
	config := func(role, name string) Config {
		url := testenv.As(t, owner.Config().ConnString(), role)
		return probed(Config{PostgresURL: url, TopologyGiven: true, AMQPURL: user(name)})
	}
	api := config("shop_api", "rpc-server")
	api.RPCOverRabbitMQ, api.Edge = true, Edge{NoAuth: true}
	await(t, "api", serve(t, RunAPI, api), http.StatusOK)
	await(t, "relay", serve(t, RunRelay, config("shop_relay", "relay")), http.StatusOK)
	await(t, "consumer", serve(t, RunConsumer, config("shop_consumer", "consumer")), http.StatusOK)

	db, err := postgres.Open(t.Context(), postgres.Config{URL: api.PostgresURL})
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	if err := send(t.Context(), db, "key", "text"); err != nil {
		t.Fatal(err)
	}
	awaitEffects(1)

	transport := rabbitrpc.NewTransport(rabbitrpc.TransportConfig{URL: user("rpc-client")})
	defer transport.Close()
	client := operationsv1connect.NewOperationServiceClient(connect.NewClient(transport))
	testenv.Eventually(t, 20*time.Second, func() error { // the server is starting
		_, err := client.ListOperations(t.Context(), &operationsv1.ListOperationsRequest{})
		return err
	})
}
