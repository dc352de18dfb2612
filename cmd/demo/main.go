//go:build unix

// Command demo runs the service through its worst day and then counts. It starts api, relay and consumer as processes
// and places orders over Connect, gRPC and gRPC-Web, many of them by repeated calls. Meanwhile it kills relay and
// consumer and cuts the connections to the broker.
//
//	make demo
//	go run ./cmd/stack -- go run ./cmd/demo [--orders N] [--rate N] [--keep]
//	go run ./cmd/demo --attach http://127.0.0.1:8080    only the load and the ledger, on a running service
//
// It creates a database and a vhost, both named orders_demo_ and eight digits, and removes them unless something
// failed. Its processes never outlive it (on Linux, not even if it is killed).
//
// The ledger reads the tables and a tap on the exchange. It does not trust the processes' own reports. The exit status
// is 0 if the ledger balances, 1 if not or if the run was aborted, and 2 on bad arguments.
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

// cli contains the flags and environment variables of the demo.
type cli struct {
	PostgresURL   string `name:"postgres-url" env:"POSTGRES_URL" help:"Postgres server; the demo creates a database."`
	AMQPURL       string `name:"amqp-url" env:"AMQP_URL" help:"RabbitMQ server; the demo creates a vhost."`
	ManagementURL string `name:"management-url" env:"RABBITMQ_MANAGEMENT_URL" help:"${management_help}"`
	Orders        int    `default:"2400" help:"Orders to place."`
	Rate          int    `help:"${rate_help}"`
	Attach        string `placeholder:"URL" help:"${attach_help}"`
	APIKey        string `name:"api-key" env:"API_KEY" help:"With --attach: the API key, if the API requires one."`
	Keep          bool   `help:"Keep the database, the vhost and the logs even if the ledger balances."`
}

// help contains texts that are too long for a tag.
var help = kong.Vars{
	"management_help": "RabbitMQ's management API with credentials. Default: the AMQP URL's host and user, port 15672.",
	"rate_help": "Maximum orders per second. Default: 110, or fewer so that the load lasts for 18 s and all faults " +
		"happen during it.",
	"attach_help": "API of a running service: place the orders there, break nothing, and balance the ledger. The other " +
		"URLs must be those of the service's database and vhost. The demo leaves both as they are.",
}

// Validate is called by kong. Its errors must not quote URLs, because URLs contain passwords.
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
		return errors.New("--amqp-url: the demo connects through its own proxy, which TLS does not accept: use " +
			"amqp, not " +
			broker.Scheme)
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
	parser := kong.Must(&flags, help, kong.Name("demo"), kong.Description("Kill the relay and the consumer, cut the "+
		"connections, and count that nothing is lost or doubled. The processes run with RELAY_LEASE=1s (default "+
		"5s), so "+
		"that a killed relay's lease ends soon."))
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

// watchParent ends the demo when `go run` ends, which does not forward SIGTERM.
func watchParent(ctx context.Context, cancel context.CancelCauseFunc) {
	if binary, err := os.Executable(); err != nil || !strings.Contains(binary, "go-build") {
		return // the end of any other parent means nothing
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
	cancel(errors.New("go run has ended"))
}
