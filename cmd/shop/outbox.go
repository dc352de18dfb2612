package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	"example.com/shop/internal/app"
	"example.com/shop/internal/messaging"
	"example.com/shop/internal/ops"
	"example.com/shop/internal/outbox"
	"github.com/google/uuid"
)

type outboxCommand struct {
	Status outboxStatusCommand `cmd:"" help:"Show the relay, backlog and progress of each shard."`
	Repair outboxRepairCommand `cmd:"" help:"Repair the outbox after a restore into another cluster."`
	Replay outboxReplayCommand `cmd:"" help:"Publish delivered messages again. Groups absorb copies of what they applied."`
	Shards outboxShardsCommand `cmd:"" help:"Show the shards, or change their number."`
}

type outboxStatusCommand struct{ adminFlags }

// outboxStatus is the output of status.
type outboxStatus struct {
	Shards  []ops.Shard `json:"shards"`
	Backlog int64       `json:"backlog"`
	Lag     float64     `json:"lag_seconds"`
}

func (c *outboxStatusCommand) Run(ctx context.Context) error {
	return c.withAdmin(ctx, func(admin *app.Admin) error {
		shards, err := ops.Shards(ctx, admin.DB)
		if err != nil {
			return err
		}
		status := outboxStatus{Shards: shards}
		for _, shard := range shards {
			if !shard.Drained {
				status.Backlog, status.Lag = status.Backlog+shard.Backlog, max(status.Lag, shard.Lag)
			}
		}
		if c.JSON {
			return printJSON(status)
		}
		return status.print(os.Stdout)
	})
}

func (s outboxStatus) print(out io.Writer) error {
	t := newTable(out, "SHARD", "RELAY", "EPOCH", "BACKLOG", "LAG", "PUBLISHED", "PARKED", "LAST MOVE")
	for _, shard := range s.Shards {
		if !shard.Drained {
			t.row(shard.Shard, shard.Owner, shard.Epoch, shard.Backlog, seconds(shard.Lag),
				shard.Published, shard.Parked, shard.MovedAt)
		}
	}
	if err := t.Flush(); err != nil {
		return err
	}
	waits := "nothing waits to be published"
	if s.Backlog > 0 {
		messages := count(s.Backlog, "message waits", "messages wait")
		waits = fmt.Sprintf("%s to be published, the oldest for %s", messages, seconds(s.Lag))
	}
	_, err := fmt.Fprintf(out, "\n%s\n", waits)
	return err
}

type outboxRepairCommand struct{ adminFlags }

func (c *outboxRepairCommand) Run(ctx context.Context) error {
	return c.withAdmin(ctx, func(admin *app.Admin) error {
		waiting, err := ops.Repair(ctx, admin.DB)
		intact := errors.Is(err, ops.ErrNoRepairNeeded)
		switch {
		case err != nil && !intact:
			return err
		case c.JSON:
			return printJSON(map[string]any{"repaired": !intact, "to_publish": waiting})
		case intact:
			fmt.Println("nothing to repair: the outbox's cursor belongs to this cluster, and no sequence is behind")
		default:
			fmt.Printf("repaired: %s will be published, some possibly again; start the relay\n",
				count(waiting, "message", "messages"))
		}
		return nil
	})
}

type outboxReplayCommand struct {
	adminFlags
	brokerFlags
	period
	Type   []string    `sep:"none" help:"Only messages of this type; may be repeated." placeholder:"TYPE"`
	Key    []string    `sep:"none" help:"Only messages of this key; may be repeated." placeholder:"KEY"`
	ID     []uuid.UUID `sep:"none" help:"Only the message with this ID; may be repeated." placeholder:"UUID"`
	Group  string      `help:"${replay_group}" placeholder:"GROUP"`
	Rate   float64     `default:"500" help:"Maximum messages per second, 0.01 to 1000000."`
	After  place       `help:"${replay_after}" placeholder:"SHARD:ID"`
	DryRun bool        `help:"Count the messages, and publish nothing."`
}

func (c *outboxReplayCommand) Validate() error {
	if err := between("--rate", c.Rate, 0.01, 1e6); err != nil {
		return err
	}
	return cmp.Or(c.brokerFlags.check(), c.period.check())
}

func (c *outboxReplayCommand) Run(ctx context.Context) error {
	database := databaseFlags{PostgresURL: c.PostgresURL}
	config := appConfig("", database, apiFlags{}, c.brokerFlags, relayFlags{}, consumerFlags{})
	return withAnySchema(ctx, config, func(admin *app.Admin) error {
		types, err := c.types(admin.Groups())
		if err != nil {
			return err
		}
		if err := admin.CheckSchema(ctx); err != nil {
			return err
		}
		filter := outbox.ReplayFilter{
			Since: c.Since.Time, Until: c.Until.Time, Types: types, Keys: c.Key, IDs: c.ID,
			After: outbox.Place(c.After),
		}
		if c.DryRun {
			done, err := outbox.Replay(ctx, admin.DB, nil, filter, c.Rate, nil)
			return c.report(done, err)
		}
		// Fail at once if the broker is unreachable; a running replay waits for it instead.
		if err := admin.CheckBroker(ctx); err != nil {
			return err
		}
		publisher := admin.Publisher(c.Group)
		defer publisher.Close()
		return c.report(c.replay(ctx, admin, publisher, filter))
	})
}

// types returns the types to replay. A replay to a group's queue bypasses the exchange, so it must only send types that
// the exchange would route there: other messages would become dead letters of the group.
func (c *outboxReplayCommand) types(groups []ops.Group) ([]string, error) {
	if c.Group == "" {
		return c.Type, nil
	}
	var names []string
	for _, group := range groups {
		names = append(names, group.Name)
	}
	i := slices.Index(names, c.Group)
	if i < 0 {
		return nil, usageErrorf("--group: there is no consumer group %q, only %s", c.Group, strings.Join(names, ", "))
	}
	for _, wanted := range c.Type {
		if !slices.Contains(groups[i].Types, wanted) {
			return nil, usageErrorf("--type: group %s does not handle %q, only %s",
				c.Group, wanted, strings.Join(groups[i].Types, ", "))
		}
	}
	if len(c.Type) > 0 {
		return c.Type, nil
	}
	return groups[i].Types, nil
}

// replay shows its progress on a terminal.
func (c *outboxReplayCommand) replay(
	ctx context.Context, admin *app.Admin, publisher messaging.Publisher, filter outbox.ReplayFilter,
) (outbox.Replayed, error) {
	var show func(outbox.Replayed)
	if isTerminal(os.Stderr) && !c.JSON {
		began := time.Now()
		show = func(done outbox.Replayed) {
			fmt.Fprintf(os.Stderr, "\r%s\x1b[K", progressLine(done, time.Since(began)))
		}
		defer fmt.Fprint(os.Stderr, "\r\x1b[K")
	}
	return outbox.Replay(ctx, admin.DB, publisher, filter, c.Rate, show)
}

func progressLine(done outbox.Replayed, elapsed time.Duration) string {
	rate := float64(done.Published) / max(elapsed.Seconds(), 0.001)
	return fmt.Sprintf("%d published, %.0f/s, up to %s", done.Published, rate, cellText(done.LastAt))
}

// report prints what was done, even by an interrupted replay.
func (c *outboxReplayCommand) report(done outbox.Replayed, err error) error {
	last := place(done.Last)
	if c.JSON {
		summary := map[string]any{"dry_run": c.DryRun, "complete": err == nil}
		if c.DryRun {
			summary["to_publish"] = done.Published
		} else {
			summary["published"], summary["unroutable"] = done.Published, done.Unroutable
		}
		if err != nil && done.Last != (outbox.Place{}) {
			summary["after"] = last.String()
		}
		if printErr := printJSON(summary); printErr != nil {
			return printErr
		}
	} else if err == nil {
		fmt.Println(c.summary(done))
	}
	switch {
	case err == nil || done.Last == (outbox.Place{}):
		return err
	case errors.Is(err, context.Canceled):
		err = errors.New("interrupted")
	}
	return fmt.Errorf("%w; %s; continue with the same command and --after=%s", err, c.summary(done), last)
}

func (c *outboxReplayCommand) summary(done outbox.Replayed) string {
	if c.DryRun {
		return count(done.Published, "message", "messages") + " would be published"
	}
	target := ""
	if c.Group != "" {
		target = " to the queue of " + c.Group + " alone"
	}
	text := count(done.Published, "message", "messages") + " published again" + target
	if done.Unroutable > 0 {
		text += fmt.Sprintf(", %d unroutable", done.Unroutable)
	}
	return text
}

type outboxShardsCommand struct {
	adminFlags
	N       *int          `arg:"" optional:"" name:"n" help:"New number of shards, 1 to 64."`
	Timeout time.Duration `default:"1m" help:"How long to wait for open transactions, 2s to 1h."`
}

func (c *outboxShardsCommand) Validate() error {
	if c.N != nil {
		if err := between("number of shards", *c.N, 1, ops.MaxShards); err != nil {
			return err
		}
	}
	return between("--timeout", c.Timeout, 2*time.Second, time.Hour)
}

func (c *outboxShardsCommand) Run(ctx context.Context) error {
	return c.withAdmin(ctx, func(admin *app.Admin) error {
		if c.N != nil {
			waiting, cancel := context.WithTimeout(ctx, c.Timeout)
			defer cancel()
			if err := ops.SetShards(waiting, admin.DB, *c.N); err != nil {
				return err
			}
		}
		shards, err := ops.Shards(ctx, admin.DB)
		if err != nil {
			return err
		}
		if c.JSON {
			return printJSON(map[string]any{"shards": shards})
		}
		return printShards(os.Stdout, shards)
	})
}

func printShards(out io.Writer, shards []ops.Shard) error {
	t := newTable(out, "SHARD", "GENERATION", "STATE", "BACKLOG", "RELAY")
	oldest := oldestGeneration(shards)
	for _, shard := range shards {
		t.row(shard.Shard, shard.Generation, shardState(shard, oldest), shard.Backlog, shard.Owner)
	}
	return t.Flush()
}

// oldestGeneration returns the generation that relays read.
func oldestGeneration(shards []ops.Shard) int {
	oldest := -1
	for _, shard := range shards {
		if !shard.Drained && (oldest < 0 || shard.Generation < oldest) {
			oldest = shard.Generation
		}
	}
	return oldest
}

func shardState(shard ops.Shard, oldest int) string {
	switch {
	case shard.Drained:
		return "drained"
	case shard.Retired:
		return "retired, not drained yet"
	case shard.Generation > oldest:
		return "waits for older shards"
	}
	return "in use"
}
