package app

import (
	"net/http"
	"testing"

	"example.com/shop/internal/dev/testenv"
	"example.com/shop/internal/postgres"
)

// Each process works with its own role in the database, and with exactly its permissions on the broker. The API has
// none there.
func TestLeastPrivilege(t *testing.T) {
	t.Parallel()
	owner, admin := testenv.Postgres(t), testenv.AMQP(t)
	awaitEffects := effectsIn(t, owner)
	service := names(t, probed(Config{Exchange: "events"}))
	if err := service.topology().Declare(t.Context(), admin); err != nil {
		t.Fatal(err)
	}
	permissions := service.permissions()
	user := func(name string) string {
		p, broker := permissions[name], testenv.Management(t, admin)
		url := broker.User(p.Configure, p.Write, p.Read)
		if p.Topics != nil {
			broker.Topics(url, p.Topics.Exchange, p.Topics.Write, p.Topics.Read)
		}
		return url
	}
	config := func(role, name string) Config {
		url := testenv.As(t, owner.Config().ConnString(), role)
		return probed(Config{PostgresURL: url, TopologyGiven: true, AMQPURL: user(name)})
	}
	api := config("shop_api", "")
	api.Edge = Edge{NoAuth: true}
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
}
