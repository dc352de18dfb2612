package main

import (
	"context"
	"fmt"
	"io"
	"os"

	"example.com/orders/internal/app"
	"example.com/orders/internal/ops"
)

type doctorCommand struct {
	deskFlags
	brokerFlags
	managementFlags
	ListenURL postgresURL `name:"postgres-listen-url" env:"POSTGRES_LISTEN_URL" help:"Direct connection to the same database, as the relay has it."`
}

func (c *doctorCommand) Validate() error { return c.brokerFlags.check() }

func (c *doctorCommand) Run(ctx context.Context) error {
	database := databaseFlags{PostgresURL: c.PostgresURL, ListenURL: c.ListenURL}
	config := appConfig("", database, apiFlags{}, c.brokerFlags, relayFlags{}, consumerFlags{})
	config.ManagementURL = string(c.ManagementURL)
	return atDesk(ctx, config, func(desk *app.Desk) error {
		findings := ops.Doctor(ctx, desk.Patient())
		var err error
		if c.JSON {
			err = printJSON(map[string]any{"verdict": ops.Worst(findings), "findings": findings})
		} else {
			err = printFindings(os.Stdout, findings)
		}
		wrong := 0
		for _, one := range findings {
			if one.Verdict == ops.Wrong {
				wrong++
			}
		}
		if err == nil && wrong > 0 {
			err = fmt.Errorf("%s something wrong", count(wrong, "check has found", "checks have found"))
		}
		return err
	})
}

func printFindings(out io.Writer, findings []ops.Finding) error {
	t := newTable(out, "CHECK", "VERDICT", "FOUND")
	for _, one := range findings {
		t.row(one.Check, one.Verdict, one.Detail)
		if one.Cure != "" {
			t.row(" ", " ", "→ "+one.Cure)
		}
	}
	return t.Flush()
}
