package app

import (
	"net/http"
	"testing"

	"example.com/orders/internal/postgres"
	"example.com/orders/internal/rabbit"
	"example.com/orders/internal/testenv"
)

// Each process does its work with its own role in the database, and with no more permissions on the broker than it says it needs.
func TestLeastPrivilege(t *testing.T) {
	t.Parallel()
	owner, admin := testenv.Postgres(t), testenv.AMQP(t)
	awaitEffects := effectsIn(t, owner)
	topology := probed(Config{}).domain(nil, nil, nil).topology("events")
	if err := topology.Declare(t.Context(), admin); err != nil {
		t.Fatal(err)
	}
	config := func(role string, permissions rabbit.Permissions) Config {
		return probed(Config{
			PostgresURL: testenv.As(t, owner.Config().ConnString(), role), TopologyGiven: true,
			AMQPURL: testenv.Management(t, admin).User(permissions.Configure, permissions.Write, permissions.Read),
		})
	}
	api := config("app_api", rabbit.Permissions{})
	await(t, "api", serve(t, RunAPI, api), http.StatusOK)
	await(t, "relay", serve(t, RunRelay, config("app_relay", topology.PublisherPermissions())), http.StatusOK)
	await(t, "consumer", serve(t, RunConsumer, config("app_consumer", topology.ConsumerPermissions())), http.StatusOK)

	db, err := postgres.Open(t.Context(), postgres.Config{URL: api.PostgresURL})
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	if err := send(t.Context(), db, "key", "text"); err != nil {
		t.Fatal(err)
	}
	awaitEffects(1)
}
