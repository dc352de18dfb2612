package app

import (
	"context"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect/v2"
	"connectrpc.com/connect/v2/connecthttp"
	"example.com/shop/internal/auth"
	"example.com/shop/internal/clients"
	"example.com/shop/internal/dev/probe"
	"example.com/shop/internal/dev/testenv"
	operationsv1 "example.com/shop/internal/gen/shop/operations/v1"
	"example.com/shop/internal/gen/shop/operations/v1/operationsv1connect"
	"example.com/shop/internal/inbox"
	"example.com/shop/internal/operations"
	"example.com/shop/internal/rabbit"
	"github.com/jackc/pgx/v5"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// called is probed with a method that writes its text to the table effects.
func called(config Config) Config {
	config = probed(config)
	probes := config.domain
	config.domain = func(from deps) (domain, error) {
		d, err := probes(from)
		d.register = func(server *connect.Server) {
			probe.Handle(server, probe.Mutate, func(ctx context.Context, text string) (string, error) {
				caller, _ := auth.FromContext(ctx)
				return caller.Subject + " did " + text, from.out.Transact(ctx, func(tx pgx.Tx) error {
					_, err := tx.Exec(ctx, `INSERT INTO effects (effect) VALUES ($1)`, text)
					return err
				})
			})
		}
		return d, err
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
	topology := names(t, probed(Config{})).topology()
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

// A message handler submits a durable call of its own service in its transaction, and another one gets the result as a
// message. The call is executed as the service, with the roles that the domain chose.
func TestAHandlerSubmitsACallAndIsNotified(t *testing.T) {
	t.Parallel()
	db := testenv.Postgres(t)
	awaitEffects := effectsIn(t, db)
	config := Config{
		PostgresURL: db.Config().ConnString(), AMQPURL: testenv.AMQP(t), Exchange: "events", Domain: new(DomainConfig),
		Edge: Edge{NoAuth: true}, Features: Features{DurableCalls: DurableCalls{Keys: [][]byte{make([]byte, 32)}}},
	}
	write := func(ctx context.Context, tx pgx.Tx, effect string) error {
		_, err := tx.Exec(ctx, `INSERT INTO effects (effect) VALUES ($1)`, effect)
		return err
	}
	config.domain = func(d deps) (domain, error) {
		submit, saga := d.submitAs("customer"), inbox.NewGroup("saga")
		inbox.Handle(saga, func(ctx context.Context, tx pgx.Tx, event *wrapperspb.StringValue) error {
			_, err := submit(ctx, tx, operations.Call{
				Procedure: probe.Mutate.Procedure, Request: event, NotifyKey: event.GetValue(),
			})
			return err
		})
		inbox.Handle(saga, func(ctx context.Context, tx pgx.Tx, ended *operationsv1.OperationEnded) error {
			var text wrapperspb.StringValue
			if err := ended.GetOperation().GetResponse().UnmarshalTo(&text); err != nil {
				return err
			}
			message, _ := inbox.FromContext(ctx)
			return write(ctx, tx, message.Key+": "+text.GetValue())
		})
		return domain{
			register: func(server *connect.Server) {
				probe.Handle(server, probe.Mutate, func(ctx context.Context, text string) (string, error) {
					caller, _ := auth.FromContext(ctx)
					return fmt.Sprint(caller.Subject, caller.Roles), d.out.Transact(ctx, func(tx pgx.Tx) error {
						return write(ctx, tx, "called with "+text)
					})
				})
			},
			groups: []group{{saga, 1}},
		}, nil
	}
	await(t, "all", start(t, RunAll, config).ready, http.StatusOK)
	if err := send(t.Context(), db, "key", "text"); err != nil {
		t.Fatal(err)
	}
	awaitEffects(2)
	var result string
	err := db.QueryRow(t.Context(), `SELECT effect FROM effects WHERE effect LIKE 'text: %'`).Scan(&result)
	if err != nil || result != "text: "+ServiceName+"[customer]" {
		t.Errorf("got %q, %v", result, err)
	}
}

// A durable call of another service waits while that service is away, is made with the same idempotency key in each
// attempt, and its result arrives as a message.
func TestADurableCallOfAnotherServiceWaitsForIt(t *testing.T) {
	t.Parallel()
	db := testenv.Postgres(t)
	awaitEffects := effectsIn(t, db)
	address := testenv.FreeAddress(t)
	config := Config{
		PostgresURL: db.Config().ConnString(), AMQPURL: testenv.AMQP(t), Exchange: "events", Domain: new(DomainConfig),
		Edge: Edge{NoAuth: true}, Features: Features{DurableCalls: DurableCalls{Keys: [][]byte{make([]byte, 32)}}},
	}
	config.domain = func(d deps) (domain, error) {
		other, err := d.client("http://"+address, clients.Config{Attempts: 1})
		if err == nil {
			err = d.forward(other, "probe.durable.v1.Probe")
		}
		submit, saga := d.submitAs(), inbox.NewGroup("saga")
		inbox.Handle(saga, func(ctx context.Context, tx pgx.Tx, event *wrapperspb.StringValue) error {
			_, err := submit(ctx, tx, operations.Call{
				Procedure: probe.Mutate.Procedure, Request: event, NotifyKey: "saga",
			})
			return err
		})
		inbox.Handle(saga, func(ctx context.Context, tx pgx.Tx, ended *operationsv1.OperationEnded) error {
			var text wrapperspb.StringValue
			if err := ended.GetOperation().GetResponse().UnmarshalTo(&text); err != nil {
				return err
			}
			_, err := tx.Exec(ctx, `INSERT INTO effects (effect) VALUES ($1)`, text.GetValue())
			return err
		})
		return domain{register: func(*connect.Server) {}, groups: []group{{saga, 1}}}, err
	}
	await(t, "all", start(t, RunAll, config).ready, http.StatusOK)
	if err := send(t.Context(), db, "key", "text"); err != nil {
		t.Fatal(err)
	}
	testenv.Eventually(t, 30*time.Second, func() error {
		var attempts int
		err := db.QueryRow(t.Context(), `SELECT max(attempts) FROM operation WHERE error IS NOT NULL`).Scan(&attempts)
		return err // until the first attempt has failed
	})
	keys := make(chan string, 10)
	server := connect.NewServer()
	probe.Handle(server, probe.Mutate, func(ctx context.Context, text string) (string, error) {
		info, _ := connect.CallInfoForServerContext(ctx)
		keys <- info.RequestHeader().Get("Idempotency-Key")
		if len(keys) == 1 {
			return "", connect.NewError(connect.CodeResourceExhausted, "busy")
		}
		return "the other did " + text, nil
	})
	mux := http.NewServeMux()
	connecthttp.Mount(mux, server)
	listening := &http.Server{Addr: address, Handler: mux}
	served := make(chan error, 1)
	go func() { served <- listening.ListenAndServe() }()
	t.Cleanup(func() { _ = listening.Close(); <-served })
	awaitEffects(1)
	if first, second := <-keys, <-keys; first != second || !strings.HasPrefix(first, "operations/") {
		t.Errorf("attempts had the keys %q and %q", first, second)
	}
}

// A typo in the name of another service ends the process at its start.
func TestForwardToAnUnknownService(t *testing.T) {
	t.Parallel()
	for _, service := range []string{"probe.durable.v1.Prob", "google.protobuf.StringValue"} {
		config := probed(Config{})
		config.domain = func(d deps) (domain, error) { return domain{}, d.forward(nil, service) }
		if _, err := declared(config); err == nil || !strings.Contains(err.Error(), service) {
			t.Errorf("%s: got %v", service, err)
		}
	}
}
