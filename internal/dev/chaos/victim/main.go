// Command victim runs the relay, the consumer or the worker for durable calls of a service without a domain. The tests
// in internal/dev/chaos kill it. Its only handler records each effect, which reveals doubled and missing ones.
package main

import (
	"cmp"
	"context"
	"fmt"
	"log"
	"log/slog"
	"os"
	"os/signal"
	"syscall"
	"time"

	"connectrpc.com/connect/v2"
	"example.com/shop/internal/changes"
	"example.com/shop/internal/dev/probe"
	"example.com/shop/internal/inbox"
	"example.com/shop/internal/messaging"
	"example.com/shop/internal/operations"
	"example.com/shop/internal/outbox"
	"example.com/shop/internal/postgres"
	"example.com/shop/internal/rabbit"
	"example.com/shop/internal/rpcserver"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"golang.org/x/sync/errgroup"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

const (
	exchange = "events"
	queue    = "victim.effects"
	calls    = "victim.operations"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer stop()
	if err := run(ctx, os.Args[1]); err != nil {
		log.Fatal(err)
	}
}

func run(ctx context.Context, role string) error {
	db, err := postgres.Open(ctx, postgres.Config{URL: os.Getenv("POSTGRES_URL")})
	if err != nil {
		return err
	}
	defer db.Close()
	group := inbox.NewGroup("effects")
	inbox.Handle(group, apply)
	topology := rabbit.Topology{Exchange: exchange, Queues: []rabbit.Queue{
		{Name: queue, Types: group.Types()}, {Name: calls, Types: []string{operations.MessageType}, Unordered: true},
	}}
	amqpURL := os.Getenv("AMQP_URL")

	running, ctx := errgroup.WithContext(ctx)
	switch role {
	case "relay":
		lease, err := time.ParseDuration(cmp.Or(os.Getenv("LEASE"), "1s"))
		if err != nil {
			return err
		}
		config := outbox.Config{PageRows: 20, Lease: lease, PollInterval: 20 * time.Millisecond}
		newPublisher := func() messaging.Publisher {
			config := rabbit.PublisherConfig{URL: amqpURL, Topology: topology, Name: "victim relay"}
			return inflating{rabbit.NewPublisher(config)}
		}
		relay := outbox.NewRelay(db, newPublisher, config)
		running.Go(func() error { return relay.Run(ctx) })
		running.Go(func() error { relay.Listen(ctx, os.Getenv("POSTGRES_URL")); return nil })
	case "consumer":
		box := inbox.New(db, group, inbox.Config{PollInterval: 20 * time.Millisecond, HandlerTimeout: time.Second})
		consumer := rabbit.NewConsumer(rabbit.ConsumerConfig{
			URL: amqpURL, Topology: topology, Queue: queue, Name: "victim consumer", Batch: 20, Lanes: 2,
		}, box.Process)
		running.Go(func() error { return consumer.Run(ctx) })
		running.Go(func() error { return box.Run(ctx) })
	case "worker":
		worker := newWorker(db)
		consumer := rabbit.NewConsumer(rabbit.ConsumerConfig{
			URL: amqpURL, Topology: topology, Queue: calls, Name: "victim worker", Unordered: true, Prefetch: 32,
		}, worker.Process)
		running.Go(func() error { return consumer.Run(ctx) })
		running.Go(func() error { return worker.Run(ctx) })
	default:
		return fmt.Errorf("unknown role %q", role)
	}
	return running.Wait()
}

// apply is deliberately not idempotent.
func apply(ctx context.Context, tx pgx.Tx, message *wrapperspb.StringValue) error {
	if message.GetValue() == "poison" {
		die()
	}
	_, err := tx.Exec(ctx, `INSERT INTO effects (message) VALUES ($1)`, message.GetValue())
	return err
}

func newWorker(db *pgxpool.Pool) *operations.Worker {
	out := outbox.NewWriter(db, nil, nil)
	server := connect.NewServer(rpcserver.Interceptors(slog.Default())...)
	probe.Handle(server, probe.Mutate, func(ctx context.Context, text string) (string, error) {
		err := out.Transact(ctx, func(tx pgx.Tx) error {
			if err := apply(ctx, tx, wrapperspb.String(text)); err != nil {
				return err
			}
			_, err := tx.Exec(ctx, `SELECT pg_sleep(0.02)`) // makes kills in the middle of a call likely
			return err
		})
		return text, err
	})
	store := operations.New(db, out, changes.New(changes.Config{}), operations.Config{})
	return operations.NewWorker(db, store, server, operations.WorkerConfig{
		Concurrency: 4, Inbox: inbox.Config{PollInterval: 20 * time.Millisecond, HandlerTimeout: 2 * time.Second},
	})
}

// die ends the process as a kill from outside does: it closes nothing and runs no deferred function.
func die() {
	self, err := os.FindProcess(os.Getpid())
	if err == nil {
		err = self.Kill()
	}
	if err == nil {
		select {} // until the signal arrives
	}
	os.Exit(137)
}
