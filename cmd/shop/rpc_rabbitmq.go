package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"text/tabwriter"
	"time"

	"connectrpc.com/connect/v2"
	"example.com/shop/internal/app"
	"example.com/shop/internal/rabbitrpc"
	"github.com/alecthomas/kong"
)

// rpcOverRabbitMQFlags are flags of the processes that serve RPCs from queues.
type rpcOverRabbitMQFlags struct {
	RPCOverRabbitMQ bool `name:"rpc-over-rabbitmq" env:"RPC_OVER_RABBITMQ" help:"Also serve the RPCs over RabbitMQ."`
	RPCPrefetch     int  `env:"RPC_PREFETCH" default:"64" help:"${rpc_prefetch}"`
}

func (f *rpcOverRabbitMQFlags) apply(config *app.Config) error {
	config.RPCOverRabbitMQ = app.RPCOverRabbitMQ{Serve: f.RPCOverRabbitMQ, Prefetch: f.RPCPrefetch}
	if f.RPCOverRabbitMQ && config.AMQPURL == "" {
		return errors.New("--rpc-over-rabbitmq needs --amqp-url")
	}
	return between("--rpc-prefetch", f.RPCPrefetch, 1, 10_000)
}

// rpcOverRabbitMQAddress is the broker of a process that needs none otherwise.
type rpcOverRabbitMQAddress struct {
	AMQPURL amqpURL `name:"amqp-url" env:"AMQP_URL" help:"RabbitMQ URL with its vhost, for --rpc-over-rabbitmq."`
}

func (f *rpcOverRabbitMQAddress) apply(config *app.Config) error {
	config.AMQPURL = string(f.AMQPURL)
	return nil
}

// callOverRabbitMQ makes rpc call use RabbitMQ.
type callOverRabbitMQ struct {
	AMQP    bool    `name:"amqp" xor:"way" help:"Call over RabbitMQ."`
	AMQPURL amqpURL `name:"amqp-url" env:"AMQP_URL" help:"RabbitMQ URL with its vhost, for --amqp."`
}

func (f *callOverRabbitMQ) check() error {
	if f.AMQP && f.AMQPURL == "" {
		return errors.New("--amqp needs --amqp-url")
	}
	return nil
}

func (f *callOverRabbitMQ) client() (client *connect.Client, done func()) {
	if !f.AMQP {
		return nil, nil
	}
	config := rabbitrpc.TransportConfig{URL: string(f.AMQPURL), Name: app.ServiceName + " rpc call"}
	transport := rabbitrpc.NewTransport(config)
	return connect.NewClient(transport), func() { _ = transport.Close() }
}

type rpcOverRabbitMQLs struct {
	Services []string      `arg:"" optional:"" help:"${rpc_services}"`
	AMQPURL  amqpURL       `name:"amqp-url" env:"AMQP_URL" required:"" help:"RabbitMQ URL with its vhost."`
	Rate     time.Duration `help:"${rpc_rate}"`
}

// Validate bounds Rate because requests to a service without replicas wait while copies are counted: see
// rabbitrpc.Rates.
func (c *rpcOverRabbitMQLs) Validate() error { return between("--rate", c.Rate, 0, time.Minute) }

func (c *rpcOverRabbitMQLs) Run(ctx context.Context) error {
	names, err := c.Services, error(nil)
	if len(names) == 0 {
		if names, err = app.Services(); err != nil {
			return err
		}
	}
	states, err := rabbitrpc.Look(ctx, string(c.AMQPURL), names...)
	if err != nil {
		return err
	}
	var rates map[string]float64
	if c.Rate > 0 {
		var served []string
		for _, state := range states {
			if state.Replicas > 0 {
				served = append(served, state.Name)
			}
		}
		rates, err = rabbitrpc.Rates(ctx, string(c.AMQPURL), rabbitrpc.DefaultExchange, c.Rate, served...)
		if err != nil {
			return err
		}
	}
	table := tabwriter.NewWriter(os.Stdout, 0, 0, 3, ' ', 0)
	fmt.Fprint(table, "SERVICE\tREPLICAS\tWAITING\tCALLS/S\n")
	for _, state := range states {
		rate := "-"
		if c.Rate > 0 {
			rate = fmt.Sprintf("%.1f", rates[state.Name])
		}
		fmt.Fprintf(table, "%s\t%d\t%d\t%s\n", state.Name, state.Replicas, state.Waiting, rate)
	}
	return table.Flush()
}

var rpcOverRabbitMQTexts = kong.Vars{
	"rpc_prefetch": "Maximum calls of one service executed at once for RabbitMQ, 1 to 10000.",
	"rpc_services": "Full names of services, such as orders.v1.OrderService. " +
		"AMQP cannot list them; the default is the services of this program.",
	"rpc_rate": "Also count incoming requests for this long, such as 2s, at most 1m. " +
		"Meanwhile the broker sends copies of them here; " +
		"a request to a service whose last replica leaves just then waits for its deadline.",
}
