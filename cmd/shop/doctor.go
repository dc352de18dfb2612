package main

import (
	"context"
	"errors"
	"io"
	"os"
	"strings"

	"example.com/shop/internal/app"
	"example.com/shop/internal/ops"
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
	return atDesk(ctx, config, func(desk *app.Admin) error {
		findings := ops.Doctor(ctx, desk.Target())
		var err error
		if c.JSON {
			err = printJSON(map[string]any{"verdict": ops.Worst(findings), "findings": findings})
		} else {
			err = printFindings(os.Stdout, findings)
		}
		switch {
		case err != nil:
			return err
		case ctx.Err() != nil:
			return errors.New("broken off: the other checks were not made")
		}
		return verdict(findings)
	})
}

// verdict is an error unless every check was made and has found nothing wrong.
func verdict(findings []ops.Finding) error {
	wrong, unknown := 0, 0
	for _, one := range findings {
		switch one.Verdict {
		case ops.Wrong:
			wrong++
		case ops.Unknown:
			unknown++
		}
		unknown += len(one.Skipped)
	}
	var parts []string
	if wrong > 0 {
		parts = append(parts, count(wrong, "check has found", "checks have found")+" something wrong")
	}
	if unknown > 0 {
		parts = append(parts, count(unknown, "check", "checks")+" could not be made")
	}
	if parts == nil {
		return nil
	}
	return errors.New(strings.Join(parts, ", "))
}

func printFindings(out io.Writer, findings []ops.Finding) error {
	t := newTable(out, "CHECK", "VERDICT", "FOUND")
	for _, one := range findings {
		t.row(one.Check, one.Verdict, one.Detail)
		if one.Cure != "" {
			t.row(" ", " ", "→ "+one.Cure)
		}
		if len(one.Skipped) > 0 {
			t.row(" ", " ", "not made for the same reason: "+strings.Join(one.Skipped, ", "))
		}
	}
	return t.Flush()
}
