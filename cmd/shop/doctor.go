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
	adminFlags
	brokerFlags
	managementFlags
	ListenURL postgresURL `name:"postgres-listen-url" env:"POSTGRES_LISTEN_URL" help:"The same as for the relay."`
}

func (c *doctorCommand) Validate() error { return c.brokerFlags.check() }

func (c *doctorCommand) Run(ctx context.Context) error {
	database := databaseFlags{PostgresURL: c.PostgresURL, ListenURL: c.ListenURL}
	config := appConfig("", database, apiFlags{}, c.brokerFlags, relayFlags{}, consumerFlags{})
	config.ManagementURL = string(c.ManagementURL)
	return withAnySchema(ctx, config, func(admin *app.Admin) error {
		findings := ops.Doctor(ctx, admin.Target())
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
			return errors.New("interrupted before the remaining checks ran")
		}
		return verdict(findings)
	})
}

// verdict returns an error unless every check ran and none failed.
func verdict(findings []ops.Finding) error {
	wrong, unknown := 0, 0
	for _, finding := range findings {
		switch finding.Verdict {
		case ops.Wrong:
			wrong++
		case ops.Unknown:
			unknown++
		}
		unknown += len(finding.Skipped)
	}
	var parts []string
	if wrong > 0 {
		parts = append(parts, count(wrong, "check", "checks")+" failed")
	}
	if unknown > 0 {
		parts = append(parts, count(unknown, "check", "checks")+" could not run")
	}
	if parts == nil {
		return nil
	}
	return errors.New(strings.Join(parts, ", "))
}

func printFindings(out io.Writer, findings []ops.Finding) error {
	t := newTable(out, "CHECK", "VERDICT", "FOUND")
	for _, finding := range findings {
		t.row(finding.Check, finding.Verdict, finding.Detail)
		if finding.Cure != "" {
			t.row(" ", " ", "→ "+finding.Cure)
		}
		if len(finding.Skipped) > 0 {
			t.row(" ", " ", "skipped for the same reason: "+strings.Join(finding.Skipped, ", "))
		}
	}
	return t.Flush()
}
