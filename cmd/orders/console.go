package main

import (
	"context"

	"example.com/orders/internal/app"
)

type consoleCommand struct {
	Listen listenAddress `env:"LISTEN" default:"127.0.0.1:8090" help:"Address to serve on."`
	databaseFlags
	brokerFlags
	edgeFlags
	managementFlags
}

func (c *consoleCommand) Run(ctx context.Context) error {
	config := appConfig(c.Listen, c.databaseFlags, apiFlags{}, c.brokerFlags, relayFlags{}, consumerFlags{})
	config.Edge, config.ManagementURL = c.edgeFlags.config(), string(c.ManagementURL)
	return app.RunConsole(ctx, config)
}
