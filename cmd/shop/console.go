package main

import (
	"context"

	"example.com/shop/internal/app"
	"github.com/alecthomas/kong"
)

// consoleFlags are flags of a process that also serves the console.
type consoleFlags struct {
	ConsoleAddr optionalAddress `env:"CONSOLE_ADDR" default:"127.0.0.1:8090" help:"${console_addr}"`
	managementFlags
}

func (f *consoleFlags) apply(config *app.Config) error {
	config.Console.Addr, config.ManagementURL = string(f.ConsoleAddr), string(f.ManagementURL)
	return nil
}

// optionalAddress is a listenAddress, or nothing.
type optionalAddress string

func (a *optionalAddress) UnmarshalText(text []byte) error {
	if len(text) == 0 {
		*a = ""
		return nil
	}
	return (*listenAddress)(a).UnmarshalText(text)
}

type consoleCommand struct {
	Listen    listenAddress `env:"LISTEN" default:"127.0.0.1:8090" help:"Address to serve on."`
	OpsListen listenAddress `env:"OPS_LISTEN" default:"127.0.0.1:9190" help:"${ops_listen}"`
	databaseFlags
	brokerFlags
	edgeFlags
	managementFlags
}

func (c *consoleCommand) config() (app.Config, error) {
	config := appConfig(c.OpsListen, c.databaseFlags, apiFlags{}, c.brokerFlags, relayFlags{}, consumerFlags{})
	config.Addr, config.Edge = string(c.Listen), c.edgeFlags.config()
	config.ManagementURL = string(c.ManagementURL)
	return checked(config, nil, &c.databaseFlags, &c.brokerFlags, &c.edgeFlags)
}

func (c *consoleCommand) Validate() error {
	if c.PostgresURL == "" || c.AMQPURL == "" {
		return nil
	}
	_, err := c.config()
	return err
}

func (c *consoleCommand) Run(ctx context.Context) error {
	return runWith(ctx, c.config, app.RunConsole)
}

var consoleTexts = kong.Vars{
	"console_addr": "Address of the operators' console; empty for none.",
}
