package main

import (
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
	Status outboxStatusCommand `cmd:"" help:"Show the shards: who holds them, what waits, how far they came."`
	Repair outboxRepairCommand `cmd:"" help:"Make the outbox usable after the database was restored into another cluster."`
	Replay outboxReplayCommand `cmd:"" help:"Publish delivered messages again. Who has applied them absorbs the copies."`
	Shards outboxShardsCommand `cmd:"" help:"Show the shards, or spread the outbox over another number of them."`
}

type outboxStatusCommand struct{ deskFlags }

// outboxStatus is what status prints.
type outboxStatus struct {
	Shards  []ops.Shard `json:"shards"`
	Backlog int64       `json:"backlog"`
	Lag     float64     `json:"lag_seconds"`
}

func (c *outboxStatusCommand) Run(ctx context.Context) error {
	return c.work(ctx, func(desk *app.Admin) error {
		shards, err := ops.Shards(ctx, desk.DB)
		if err != nil {
			return err
		}
		status := outboxStatus{Shards: shards}
		for _, one := range shards {
			if !one.Drained {
				status.Backlog, status.Lag = status.Backlog+one.Backlog, max(status.Lag, one.Lag)
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
	for _, one := range s.Shards {
		if !one.Drained {
			t.row(one.Shard, one.Owner, one.Epoch, one.Backlog, seconds(one.Lag), one.Published, one.Parked, one.MovedAt)
		}
	}
	if err := t.Flush(); err != nil {
		return err
	}
	waits := "nothing waits to be published"
	if s.Backlog > 0 {
		waits = fmt.Sprintf("%s to be published, the oldest for %s", count(s.Backlog, "message waits", "messages wait"), seconds(s.Lag))
	}
	_, err := fmt.Fprintf(out, "\n%s\n", waits)
	return err
}

type outboxRepairCommand struct{ deskFlags }

func (c *outboxRepairCommand) Run(ctx context.Context) error {
	return c.work(ctx, func(desk *app.Admin) error {
		waiting, err := ops.Repair(ctx, desk.DB)
		intact := errors.Is(err, ops.ErrNoRepairNeeded)
		switch {
		case err != nil && !intact:
			return err
		case c.JSON:
			return printJSON(map[string]any{"repaired": !intact, "to_publish": waiting})
		case intact:
			fmt.Println("nothing to repair: the outbox's cursor belongs to this cluster, and no sequence is behind")
		default:
			fmt.Printf("repaired: %s to be published, some of them maybe again; start the relay\n", count(waiting, "message is", "messages are"))
		}
		return nil
	})
}

type outboxReplayCommand struct {
	deskFlags
	brokerFlags
	period
	Type   []string    `sep:"none" help:"Only messages of this type; may be repeated." placeholder:"TYPE"`
	Key    []string    `sep:"none" help:"Only messages of this key; may be repeated." placeholder:"KEY"`
	ID     []uuid.UUID `sep:"none" help:"Only the message with this ID; may be repeated." placeholder:"UUID"`
	Group  string      `help:"Only to this consumer group's queue, such as a new one's, and only what it handles." placeholder:"GROUP"`
	Rate   float64     `default:"500" help:"Most messages a second, 0.01 to 1000000."`
	After  place       `help:"Go on from where another replay with the same filters was broken off." placeholder:"SHARD:ID"`
	DryRun bool        `help:"Count, and publish nothing."`
}

func (c *outboxReplayCommand) Validate() error {
	if err := between("--rate", c.Rate, 0.01, 1e6); err != nil {
		return err
	}
	return firstOf(&c.brokerFlags, &c.period)
}

func (c *outboxReplayCommand) Run(ctx context.Context) error {
	config := appConfig("", databaseFlags{PostgresURL: c.PostgresURL}, apiFlags{}, c.brokerFlags, relayFlags{}, consumerFlags{})
	return atDesk(ctx, config, func(desk *app.Admin) error {
		types, err := c.types(desk.Groups())
		if err != nil {
			return err
		}
		filter := outbox.ReplayFilter{
			Since: c.Since.Time, Until: c.Until.Time, Types: types, Keys: c.Key, IDs: c.ID, After: outbox.Place(c.After),
		}
		if c.DryRun {
			done, err := outbox.Replay(ctx, desk.DB, nil, filter, c.Rate, nil)
			return c.report(done, err)
		}
		// Said at once; later the replay waits for a broker that goes away.
		if err := desk.CheckBroker(ctx); err != nil {
			return err
		}
		publisher := desk.Publisher(c.Group)
		defer publisher.Close()
		return c.report(c.replay(ctx, desk, publisher, filter))
	})
}

// types are the types to replay. What goes to a group's queue past the exchange must be what the exchange would send there: of anything else the group
// would make dead letters.
func (c *outboxReplayCommand) types(groups []ops.Group) ([]string, error) {
	if c.Group == "" {
		return c.Type, nil
	}
	var names []string
	for _, one := range groups {
		names = append(names, one.Name)
	}
	i := slices.Index(names, c.Group)
	if i < 0 {
		return nil, wrongUsage("--group: there is no consumer group %q, only %s", c.Group, strings.Join(names, ", "))
	}
	for _, wanted := range c.Type {
		if !slices.Contains(groups[i].Types, wanted) {
			return nil, wrongUsage("--type: group %s does not handle %q, only %s", c.Group, wanted, strings.Join(groups[i].Types, ", "))
		}
	}
	if len(c.Type) > 0 {
		return c.Type, nil
	}
	return groups[i].Types, nil
}

// replay shows its progress if somebody watches.
func (c *outboxReplayCommand) replay(ctx context.Context, desk *app.Admin, publisher messaging.Publisher, filter outbox.ReplayFilter) (outbox.Replayed, error) {
	var show func(outbox.Replayed)
	if isTerminal(os.Stderr) && !c.JSON {
		began := time.Now()
		show = func(done outbox.Replayed) {
			fmt.Fprintf(os.Stderr, "\r%s\x1b[K", progressLine(done, time.Since(began)))
		}
		defer fmt.Fprint(os.Stderr, "\r\x1b[K")
	}
	return outbox.Replay(ctx, desk.DB, publisher, filter, c.Rate, show)
}

func progressLine(done outbox.Replayed, elapsed time.Duration) string {
	return fmt.Sprintf("%d published, %.0f/s, up to %s", done.Published, float64(done.Published)/max(elapsed.Seconds(), 0.001), cellText(done.LastAt))
}

// report says what was done, also when it was broken off.
func (c *outboxReplayCommand) report(done outbox.Replayed, err error) error {
	goOn := place(done.Last)
	if c.JSON {
		summary := map[string]any{"dry_run": c.DryRun, "published": done.Published, "unroutable": done.Unroutable, "complete": err == nil}
		if c.DryRun {
			summary = map[string]any{"dry_run": true, "to_publish": done.Published, "complete": err == nil}
		}
		if err != nil && done.Last != (outbox.Place{}) {
			summary["after"] = goOn.String()
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
		err = errors.New("broken off")
	}
	return fmt.Errorf("%w; %s; the same command with --after=%s goes on", err, c.summary(done), goOn)
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
		text += fmt.Sprintf(", %d left out that no queue wants", done.Unroutable)
	}
	return text
}

type outboxShardsCommand struct {
	deskFlags
	N       *int          `arg:"" optional:"" name:"n" help:"Number of shards from now on, 1 to 64."`
	Timeout time.Duration `default:"1m" help:"How long to wait for transactions that are under way, 2s to 1h."`
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
	return c.work(ctx, func(desk *app.Admin) error {
		if c.N != nil {
			waiting, cancel := context.WithTimeout(ctx, c.Timeout)
			defer cancel()
			if err := ops.SetShards(waiting, desk.DB, *c.N); err != nil {
				return err
			}
		}
		shards, err := ops.Shards(ctx, desk.DB)
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
	for _, one := range shards {
		t.row(one.Shard, one.Generation, shardState(one, oldest), one.Backlog, one.Owner)
	}
	return t.Flush()
}

// oldestGeneration is the one that is being read.
func oldestGeneration(shards []ops.Shard) int {
	oldest := -1
	for _, one := range shards {
		if !one.Drained && (oldest < 0 || one.Generation < oldest) {
			oldest = one.Generation
		}
	}
	return oldest
}

func shardState(one ops.Shard, oldest int) string {
	switch {
	case one.Drained:
		return "drained"
	case one.Retired:
		return "retired, not drained yet"
	case one.Generation > oldest:
		return "waits for the old ones"
	}
	return "in use"
}
