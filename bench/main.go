// Command bench measures the service against its own ceilings and against its peers. A row is a scenario. Its
// contestants take turns within each round, so that other load on the machine affects all of them. Compare the ratios
// within a round, not the rates.
package main

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"slices"
	"strings"
	"time"

	"github.com/alecthomas/kong"
)

type flags struct {
	PostgresURL string `name:"postgres-url" env:"POSTGRES_URL" required:"" help:"Postgres; a superuser's URL."`
	AMQPURL     string `name:"amqp-url" env:"AMQP_URL" required:"" help:"RabbitMQ."`

	Run   runCommand   `cmd:"" default:"withargs" help:"Measure."`
	Relay relayCommand `cmd:"" name:"run-relay" hidden:"" help:"Run the relay under test in its own process."`
}

type runCommand struct {
	Rows   []string `arg:"" optional:"" help:"Rows to measure (default: all)."`
	Rounds int      `default:"5" help:"Runs of each contestant."`
	Quick  bool     `help:"Use a tenth of the messages. The numbers are not fit to quote."`
	Binary string   `default:"bin/shop" help:"The service's binary, for the rows that measure whole processes."`
	Out    string   `help:"Also write the table to this file."`
}

// rows lists all rows in the order of the table.
var rows = []row{
	relayRow, consumeRow, placeRow, latencyRow, burstRow, rpcRow, callsRow, heldRow, backlogRow, peersRow,
	peerLatencyRow,
	idleRow,
}

func main() {
	var f flags
	command := kong.Parse(&f, kong.Name("bench"))
	// The contestants log nothing below warnings, and their warnings matter.
	slog.SetDefault(slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn})))
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	command.BindTo(ctx, (*context.Context)(nil))
	command.FatalIfErrorf(command.Run(&f))
}

func (c *runCommand) Run(ctx context.Context, f *flags) error {
	chosen, err := choose(c.Rows)
	if err != nil {
		return err
	}
	b := &bench{flags: f, quick: c.Quick, binary: c.Binary, templates: map[string]string{}}
	defer b.close()
	machine, err := describeMachine(ctx, f)
	if err != nil {
		return err
	}
	report := report{machine: machine, began: time.Now(), rounds: c.Rounds, quick: c.Quick}
	for _, row := range chosen {
		results, err := row.measure(ctx, b, c.Rounds)
		if err != nil {
			return fmt.Errorf("row %s: %w", row.name, err)
		}
		report.add(row, results)
	}
	if err := report.write(os.Stdout); err != nil {
		return err
	}
	if c.Out != "" {
		if err := writeFile(c.Out, &report); err != nil {
			return err
		}
	}
	if len(report.missed) > 0 {
		return fmt.Errorf("missed targets: %s", strings.Join(report.missed, "; "))
	}
	return nil
}

func choose(names []string) ([]row, error) {
	if len(names) == 0 {
		return rows, nil
	}
	var chosen []row
	for _, name := range names {
		i := slices.IndexFunc(rows, func(r row) bool { return r.name == name })
		if i < 0 {
			var known []string
			for _, r := range rows {
				known = append(known, r.name)
			}
			return nil, fmt.Errorf("no row %q; the rows are %s", name, strings.Join(known, ", "))
		}
		chosen = append(chosen, rows[i])
	}
	return chosen, nil
}

func writeFile(name string, report *report) error {
	var text strings.Builder
	if err := report.write(io.Writer(&text)); err != nil {
		return err
	}
	return os.WriteFile(name, []byte(text.String()), 0o644)
}
