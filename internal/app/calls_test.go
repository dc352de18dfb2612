package app

import (
	"context"
	"net/http"
	"testing"
	"time"

	"connectrpc.com/connect/v2"
	"connectrpc.com/connect/v2/connecthttp"
	"example.com/shop/internal/auth"
	"example.com/shop/internal/changes"
	"example.com/shop/internal/dev/probe"
	"example.com/shop/internal/dev/testenv"
	operationsv1 "example.com/shop/internal/gen/shop/operations/v1"
	"example.com/shop/internal/gen/shop/operations/v1/operationsv1connect"
	"example.com/shop/internal/outbox"
	"example.com/shop/internal/rabbit"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// called is probed with a method that writes its text to the table effects.
func called(config Config) Config {
	config = probed(config)
	probes := config.domain
	config.domain = func(db *pgxpool.Pool, out *outbox.Writer, hub *changes.Hub) domain {
		d := probes(db, out, hub)
		d.register = func(server *connect.Server) {
			probe.Handle(server, probe.Mutate, func(ctx context.Context, text string) (string, error) {
				caller, _ := auth.FromContext(ctx)
				return caller.Subject + " did " + text, out.Transact(ctx, func(tx pgx.Tx) error {
					_, err := tx.Exec(ctx, `INSERT INTO effects (effect) VALUES ($1)`, text)
					return err
				})
			})
		}
		return d
	}
	return config
}

// A durable call passes API, relay, broker and consumer, each with its own permissions, and its caller gets the
// result. A repeated call with an idempotency key gets the stored response.
func TestCallsThroughTheProcesses(t *testing.T) {
	t.Parallel()
	owner, admin := testenv.Postgres(t), testenv.AMQP(t)
	awaitEffects := effectsIn(t, owner)
	if _, err := owner.Exec(t.Context(), `GRANT INSERT ON effects TO shop_api`); err != nil {
		t.Fatal(err)
	}
	topology := declared(probed(Config{})).topology()
	if err := topology.Declare(t.Context(), admin); err != nil {
		t.Fatal(err)
	}
	secret, line, err := auth.NewKey("tester", []string{"customer"})
	if err != nil {
		t.Fatal(err)
	}
	config := func(role string, permissions rabbit.Permissions) Config {
		return called(Config{
			PostgresURL: testenv.As(t, owner.Config().ConnString(), role), TopologyGiven: true,
			AMQPURL: testenv.Management(t, admin).User(permissions.Configure, permissions.Write, permissions.Read),
			Edge:    Edge{APIKeys: line}, Features: Features{DurableCalls: DurableCalls{Keys: [][]byte{make([]byte, 32)}}},
		})
	}
	api := start(t, RunAPI, config("shop_api", rabbit.Permissions{}))
	await(t, "API", api.ready, http.StatusOK)
	await(t, "relay", serve(t, RunRelay, config("shop_relay", topology.PublisherPermissions())), http.StatusOK)
	await(t, "consumer", serve(t, RunConsumer, config("shop_consumer", topology.ConsumerPermissions())), http.StatusOK)
	authenticate := func(next connect.ClientFunc) connect.ClientFunc {
		return func(ctx context.Context, spec connect.Spec) (connect.ClientStream, error) {
			info, _ := connect.CallInfoForClientContext(ctx)
			info.RequestHeader().Set("X-Api-Key", secret)
			return next(ctx, spec)
		}
	}
	client := connect.NewClient(connecthttp.NewTransport(web, api.url), authenticate)
	ctx, info := connect.NewClientContext(t.Context())
	info.RequestHeader().Set("Prefer", "respond-async")
	if answer, err := probe.Call(ctx, client, probe.Mutate, "later"); err != nil || answer != "" {
		t.Fatalf("%q, %v", answer, err)
	}
	name := info.ResponseHeader().Get("Operation")
	operations := operationsv1connect.NewOperationServiceClient(client)
	var last *operationsv1.Operation
	for deadline := time.Now().Add(30 * time.Second); last.GetEndTime() == nil && time.Now().Before(deadline); {
		response, err := operations.WaitOperation(t.Context(), &operationsv1.WaitOperationRequest{Name: name})
		if err != nil {
			t.Fatal(err)
		}
		last = response.GetOperation()
	}
	var text wrapperspb.StringValue
	if err := last.GetResponse().UnmarshalTo(&text); err != nil || text.GetValue() != "tester did later" {
		t.Errorf("ended as %v, %v", last, err)
	}
	awaitEffects(1)

	for range 2 {
		ctx, info := connect.NewClientContext(t.Context())
		info.RequestHeader().Set("Idempotency-Key", "key")
		if answer, err := probe.Call(ctx, client, probe.Mutate, "once"); err != nil || answer != "tester did once" {
			t.Errorf("%q, %v", answer, err)
		}
	}
	awaitEffects(2)
}

func TestDurableCallsSurviveAFailover(t *testing.T) {
	t.Parallel()
	testFailover(t, 0, func(before *connect.Client) map[string]call {
		ctx, info := connect.NewClientContext(t.Context())
		info.RequestHeader().Set("Prefer", "respond-async")
		if _, err := probe.Call(ctx, before, probe.Mutate, "to be cancelled"); err != nil {
			t.Fatal(err)
		}
		operation := info.ResponseHeader().Get("Operation")
		return map[string]call{
			"a durable call": func(client *connect.Client) error {
				ctx := withHeader(t.Context(), "Idempotency-Key", "durable", "Prefer", "respond-async")
				_, err := probe.Call(ctx, client, probe.Mutate, "durable")
				return err
			},
			"a durable call that is cancelled": func(client *connect.Client) error {
				_, err := operationsv1connect.NewOperationServiceClient(client).
					CancelOperation(t.Context(), &operationsv1.CancelOperationRequest{Name: operation})
				return err
			},
		}
	})
}
