// Command victim runs a process of a service without a domain. The tests in internal/dev/chaos kill it. Its only
// handler records each effect, which reveals doubled and missing ones.
package main

import (
	"cmp"
	"context"
	"fmt"
	"log"
	"os"
	"os/signal"
	"syscall"
	"time"

	"example.com/shop/internal/inbox"
	"example.com/shop/internal/messaging"
	"example.com/shop/internal/outbox"
	"example.com/shop/internal/postgres"
	"example.com/shop/internal/rabbit"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"golang.org/x/sync/errgroup"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

const queue = "victim.effects"

// roles contains what the process can run, by its argument.
var roles = map[string]func(context.Context, *errgroup.Group, *pgxpool.Pool) error{
	"relay": runRelay, "consumer": runConsumer,
}

var (
	amqpURL  = os.Getenv("AMQP_URL")
	topology = rabbit.Topology{Exchange: "events", Queues: []rabbit.Queue{
		{Name: queue, Types: []string{"google.protobuf.StringValue"}},
	}}
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
	start, known := roles[role]
	if !known {
		return fmt.Errorf("unknown role %q", role)
	}
	running, ctx := errgroup.WithContext(ctx)
	if err := start(ctx, running, db); err != nil {
		return err
	}
	return running.Wait()
}

func runRelay(ctx context.Context, running *errgroup.Group, db *pgxpool.Pool) error {
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
	return nil
}

func runConsumer(ctx context.Context, running *errgroup.Group, db *pgxpool.Pool) error {
	group := inbox.NewGroup("effects")
	inbox.Handle(group, apply)
	box := inbox.New(db, group, inbox.Config{PollInterval: 20 * time.Millisecond, HandlerTimeout: time.Second})
	consumer := rabbit.NewConsumer(rabbit.ConsumerConfig{
		URL: amqpURL, Topology: topology, Queue: queue, Name: "victim consumer", Batch: 20, Lanes: 2,
	}, box.Process)
	running.Go(func() error { return consumer.Run(ctx) })
	running.Go(func() error { return box.Run(ctx) })
	return nil
}

// apply is deliberately not idempotent.
func apply(ctx context.Context, tx pgx.Tx, message *wrapperspb.StringValue) error {
	if message.GetValue() == "poison" {
		die()
	}
	_, err := tx.Exec(ctx, `INSERT INTO effects (message) VALUES ($1)`, message.GetValue())
	return err
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
