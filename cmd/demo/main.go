//go:build unix

// Command demo runs the service through its worst day and then counts: api, relay and consumer as processes of their own, a load of orders
// over Connect, gRPC and gRPC-Web with repeated calls, while relay and consumer are killed and the broker's connections are cut.
//
//	make demo
//	go run ./cmd/stack -- go run ./cmd/demo [--orders N] [--rate N] [--keep]
//	go run ./cmd/demo --attach http://127.0.0.1:8080    the load and the ledger alone, on a service that runs already
//
// It works in a database and a vhost of its own, both called orders_demo_ and eight digits, which it removes unless something failed. Its
// processes never outlive it (on Linux, not even if it is killed).
//
// The ledger at the end is read from the tables and from a tap on the exchange, not from what the processes say of themselves. Exit status
// 0 if it balances, 1 if not or if the run was broken off, 2 on bad arguments.
package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"example.com/shop/internal/bounds"
	"example.com/shop/internal/rabbit"
	"github.com/alecthomas/kong"
	"github.com/jackc/pgx/v5"
	amqp "github.com/rabbitmq/amqp091-go"
)

const (
	exitFailure = 1
	exitUsage   = 2
)

// cli is every flag and environment variable of the demo.
type cli struct {
	PostgresURL   string `name:"postgres-url" env:"POSTGRES_URL" help:"Postgres server; the demo makes a database of its own there."`
	AMQPURL       string `name:"amqp-url" env:"AMQP_URL" help:"RabbitMQ server; the demo makes a vhost of its own there."`
	ManagementURL string `name:"management-url" env:"RABBITMQ_MANAGEMENT_URL" help:"RabbitMQ's management API with credentials. Default: the AMQP URL's host and user, port 15672."`
	Orders        int    `default:"2400" help:"Orders to place."`
	Rate          int    `help:"Orders placed a second, at most. Default: 110, or fewer so that the load lasts for 18 s and the faults fall into it."`
	Attach        string `placeholder:"URL" help:"API of a service that runs already: place the orders there, break nothing, and balance what became of them. The URLs are then those of its own database and vhost, which keep what they have."`
	APIKey        string `name:"api-key" env:"API_KEY" help:"With --attach: the API key, if the API asks for one."`
	Keep          bool   `help:"Keep database, vhost and logs also when all is well."`
}

// Validate is called by kong. Its errors quote no URL: there are passwords in them.
func (c *cli) Validate() error {
	if c.PostgresURL == "" || c.AMQPURL == "" {
		return errors.New("set POSTGRES_URL and AMQP_URL, or run `make demo`, which starts private servers")
	}
	whole, err := rabbit.WithPassword(c.AMQPURL, os.Getenv("AMQP_PASSWORD"))
	if err != nil {
		return errors.New("--amqp-url: not an AMQP URL")
	}
	c.AMQPURL = whole
	broker, err := amqp.ParseURI(c.AMQPURL)
	switch _, pgErr := pgx.ParseConfig(c.PostgresURL); {
	case pgErr != nil:
		return errors.New("--postgres-url: not a Postgres URL or connection string")
	case err != nil:
		return errors.New("--amqp-url: not an AMQP URL")
	case c.Attach == "" && broker.Scheme != "amqp":
		return errors.New("--amqp-url: the demo cuts connections in a proxy of its own, which TLS would not accept: use amqp, not " + broker.Scheme)
	case c.Orders < 100 || c.Orders > 100_000:
		return fmt.Errorf("--orders: %d is not between 100 and 100000", c.Orders)
	case c.Rate < 0 || c.Rate > 10_000:
		return fmt.Errorf("--rate: %d is not between 1 and 10000", c.Rate)
	}
	c.Rate = cmp.Or(c.Rate, max(1, min(110, c.Orders/18)))
	return nil
}

func main() {
	var flags cli
	parser := kong.Must(&flags, kong.Name("demo"), kong.Description("Kill the relay and the consumer, cut the connections, and count that nothing is lost or doubled. "+
		"The processes run with RELAY_LEASE=1s (default 5s), so that the demo need not wait long for a killed relay's lease to end."))
	if _, err := parser.Parse(os.Args[1:]); err != nil {
		fail(exitUsage, err.Error())
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second signal kills
	ctx, cancel := context.WithCancelCause(ctx)
	go watchParent(ctx, cancel)

	play := run
	if flags.Attach != "" {
		play = attach
	}
	balanced, err := play(ctx, flags, newScreen(os.Stdout))
	switch {
	case err != nil:
		fail(exitFailure, err.Error())
	case !balanced:
		os.Exit(exitFailure)
	}
}

func fail(status int, text string) {
	fmt.Fprintf(os.Stderr, "demo: %s\n", bounds.URLs(text))
	os.Exit(status)
}

// watchParent ends the demo when `go run` is gone: it does not pass SIGTERM on.
func watchParent(ctx context.Context, cancel context.CancelCauseFunc) {
	if binary, err := os.Executable(); err != nil || !strings.Contains(binary, "go-build") {
		return // any other parent may go without that meaning anything
	}
	parent := os.Getppid()
	ticker := time.NewTicker(200 * time.Millisecond)
	defer ticker.Stop()
	for os.Getppid() == parent {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
	}
	cancel(errors.New("go run is gone"))
}
