// Command bench measures the relay against what RabbitMQ itself can do: the same messages to the same kind of queue, the runs of the two
// taking turns, so that what the machine does meanwhile falls on both. What counts is the ratio, not the rates.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"slices"
	"time"

	"github.com/alecthomas/kong"
)

type flags struct {
	PostgresURL string `name:"postgres-url" env:"POSTGRES_URL" required:"" help:"A Postgres in which databases may be created."`
	AMQPURL     string `name:"amqp-url" env:"AMQP_URL" required:"" help:"RabbitMQ."`

	Run   runCommand   `cmd:"" default:"withargs" help:"Measure."`
	Relay relayCommand `cmd:"" hidden:"" help:"The relay under test, in a process of its own."`
}

type runCommand struct {
	Backlog int     `default:"50000" help:"Messages of one run."`
	Payload int     `default:"512" help:"Bytes of one message's payload."`
	Rounds  int     `default:"3" help:"Runs of each; the median is reported."`
	Least   float64 `default:"0.85" help:"Fail below this ratio of the medians."`
	MaxMiB  float64 `default:"100" help:"Fail if the relay's memory was above this."`
}

func main() {
	var f flags
	command := kong.Parse(&f, kong.Name("bench"))
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	command.BindTo(ctx, (*context.Context)(nil))
	command.FatalIfErrorf(command.Run(&f))
}

// result is one run.
type result struct {
	took   time.Duration
	maxRSS float64 // MiB, 0 if not measured
}

func (c *runCommand) Run(ctx context.Context, f *flags) error {
	messages := makeMessages(c.Backlog, c.Payload)
	var raw, relay []result
	for round := range c.Rounds {
		one, err := measureRaw(ctx, f.AMQPURL, messages)
		if err != nil {
			return fmt.Errorf("raw confirms: %w", err)
		}
		raw = append(raw, one)
		other, err := measureRelay(ctx, f, messages)
		if err != nil {
			return fmt.Errorf("relay: %w", err)
		}
		relay = append(relay, other)
		fmt.Printf("round %d: raw %6.0f msg/s, relay %6.0f msg/s, ratio %.2f, relay's memory %.0f MiB\n", round+1,
			c.rate(one), c.rate(other), c.rate(other)/c.rate(one), other.maxRSS)
	}
	return c.report(raw, relay)
}

func (c *runCommand) rate(r result) float64 { return float64(c.Backlog) / r.took.Seconds() }

func (c *runCommand) report(raw, relay []result) error {
	rates := func(results []result) (all []float64) {
		for _, one := range results {
			all = append(all, c.rate(one))
		}
		slices.Sort(all)
		return all
	}
	memory := slices.MaxFunc(relay, func(a, b result) int { return int(a.maxRSS - b.maxRSS) }).maxRSS
	a, b := rates(raw), rates(relay)
	median := func(sorted []float64) float64 { return sorted[len(sorted)/2] }
	ratio := median(b) / median(a)
	fmt.Printf("\n%d messages of %d bytes, median (least to most) of %d runs each\n\n", c.Backlog, c.Payload, c.Rounds)
	fmt.Printf("| | msg/s | least | most |\n|---|---|---|---|\n")
	fmt.Printf("| raw pipelined confirms | %.0f | %.0f | %.0f |\n", median(a), a[0], a[len(a)-1])
	fmt.Printf("| relay draining the outbox | %.0f | %.0f | %.0f |\n", median(b), b[0], b[len(b)-1])
	fmt.Printf("\nratio %.2f (at least %.2f wanted), relay's memory at most %.0f MiB (below %.0f wanted)\n", ratio, c.Least, memory, c.MaxMiB)
	if ratio < c.Least || memory >= c.MaxMiB {
		return fmt.Errorf("not as good as wanted")
	}
	return nil
}
