package app

import (
	"context"
	"errors"
	"net/http"
	"testing"

	"connectrpc.com/connect/v2"
	"example.com/shop/internal/auth"
	"example.com/shop/internal/clients"
	"example.com/shop/internal/dev/probe"
	"example.com/shop/internal/dev/testenv"
	"example.com/shop/internal/inbox"
	"github.com/jackc/pgx/v5"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// A domain is made once, gets its configuration, and is closed once, after its last handler has returned.
func TestTheDomainIsClosedAfterItsLastHandler(t *testing.T) {
	t.Parallel()
	db := testenv.Postgres(t)
	awaitEffects := effectsIn(t, db)
	began, ended := make(chan struct{}), make(chan struct{})
	var events []string // of one goroutine at a time: newDomain, the handler, close
	own := new(DomainConfig)
	config := Config{
		PostgresURL: db.Config().ConnString(), AMQPURL: testenv.AMQP(t), Exchange: "events", Domain: own,
		Edge: Edge{NoAuth: true},
	}
	config.domain = func(d deps) (domain, error) {
		events = append(events, "made")
		if d.namesOnly || d.config != *own || d.db == nil || d.out == nil || d.changes == nil {
			t.Errorf("got %+v", d)
		}
		slow := inbox.NewGroup("slow")
		inbox.Handle(slow, func(ctx context.Context, tx pgx.Tx, text *wrapperspb.StringValue) error {
			close(began)
			<-ended
			events = append(events, "handled")
			_, err := tx.Exec(ctx, `INSERT INTO effects (effect) VALUES ($1)`, text.GetValue())
			return err
		})
		closed := func() { events = append(events, "closed") }
		return domain{register: func(*connect.Server) {}, groups: []group{{slow, 1}}, close: closed}, nil
	}
	all := start(t, RunAll, config)
	await(t, "all", all.ready, http.StatusOK)
	if err := send(t.Context(), db, "key", "text"); err != nil {
		t.Fatal(err)
	}
	<-began
	stopped := make(chan struct{})
	go func() { defer close(stopped); all.stop() }()
	close(ended)
	<-stopped
	awaitEffects(1)
	if len(events) != 3 || events[1] != "handled" || events[2] != "closed" {
		t.Errorf("got %q, want made, handled, closed", events)
	}
}

// An error of the domain ends each process and each operators' command with that error.
func TestAnErrorOfTheDomainEndsTheProcess(t *testing.T) {
	t.Parallel()
	broken := errors.New("no such file")
	config := Config{PostgresURL: testenv.PostgresURL(t), AMQPURL: testenv.AMQP(t), Exchange: "events"}
	config.domain = func(deps) (domain, error) { return domain{}, broken }
	for name, run := range map[string]func(context.Context, Config) error{
		"api": RunAPI, "relay": RunRelay, "consumer": RunConsumer, "all": RunAll,
		"an operators' command": func(ctx context.Context, config Config) error {
			_, err := OpenAdmin(ctx, config)
			return err
		},
		"topology": func(_ context.Context, config Config) error {
			_, err := declared(config)
			return err
		},
	} {
		if err := run(t.Context(), config); !errors.Is(err, broken) {
			t.Errorf("%s: got %v, want %v", name, err, broken)
		}
	}
}

// A process that only needs names gets no configuration, and its domain is closed, too.
func TestADomainForNamesOnly(t *testing.T) {
	t.Parallel()
	closed := 0
	config := Config{Exchange: "events", Domain: new(DomainConfig)}
	config.domain = func(d deps) (domain, error) {
		if !d.namesOnly {
			t.Error("the domain should open nothing")
		}
		named := inbox.NewGroup("group")
		inbox.Handle(named, func(context.Context, pgx.Tx, *wrapperspb.StringValue) error { return nil })
		return domain{
			register: func(*connect.Server) {}, groups: []group{{named, 1}}, close: func() { closed++ },
		}, nil
	}
	p, err := declared(config)
	if err != nil {
		t.Fatal(err)
	}
	const want = ServiceName + ".group"
	if queue := p.topology().Queues[0]; queue.Name != want || closed != 1 {
		t.Errorf("queue %s, closed %d times, want %s and once", queue.Name, closed, want)
	}
}

// A domain calls another service with its own settings. Operators' commands need none of these settings.
func TestTheDomainCallsAnotherService(t *testing.T) {
	t.Parallel()
	key, line, err := auth.NewKey("shipping", []string{"customer"})
	if err != nil {
		t.Fatal(err)
	}
	other := Config{PostgresURL: testenv.PostgresURL(t), Edge: Edge{APIKeys: line}}
	other.domain = func(deps) (domain, error) {
		return domain{register: func(server *connect.Server) {
			probe.Handle(server, probe.Mutate, func(ctx context.Context, text string) (string, error) {
				caller, _ := auth.FromContext(ctx)
				return caller.Subject + " asks " + text, nil
			})
		}}, nil
	}
	called := start(t, RunAPI, other)
	await(t, "other", called.ready, http.StatusOK)

	var made *connect.Client
	config := Config{PostgresURL: testenv.PostgresURL(t), Edge: Edge{NoAuth: true}, Domain: new(DomainConfig)}
	config.domain = func(d deps) (_ domain, err error) {
		url := called.url
		if d.namesOnly {
			url = ""
		}
		made, err = d.client(url, clients.Config{APIKey: key})
		return domain{register: func(*connect.Server) {}}, err
	}
	names(t, config)
	await(t, "calling", start(t, RunAPI, config).ready, http.StatusOK)
	if answer, err := probe.Call(t.Context(), made, probe.Mutate, "text"); err != nil || answer != "shipping asks text" {
		t.Errorf("got %q, %v", answer, err)
	}
}
