package main

import (
	"context"

	"example.com/shop/internal/app"
)

type consoleCommand struct {
	Listen    listenAddress `env:"LISTEN" default:"127.0.0.1:8090" help:"Address to serve on."`
	OpsListen listenAddress `env:"OPS_LISTEN" default:"127.0.0.1:9190" help:"${ops_listen}"`
	databaseFlags
	brokerFlags
	edgeFlags
	managementFlags
}

func (c *consoleCommand) Run(ctx context.Context) error {
	config := appConfig(c.OpsListen, c.databaseFlags, apiFlags{}, c.brokerFlags, relayFlags{}, consumerFlags{})
	config.Addr = string(c.Listen)
	config.Edge, config.ManagementURL = c.edgeFlags.config(), string(c.ManagementURL)
	return app.RunConsole(ctx, config)
}
