package main

import (
	"bytes"
	"context"
	"fmt"
	"os/exec"
	"regexp"
	"slices"
	"strconv"
	"syscall"
	"testing"
	"time"

	"example.com/shop/internal/app"
	"example.com/shop/internal/dev/testenv"
	"example.com/shop/internal/ops"
)

func TestOutboxStatus(t *testing.T) {
	f := newFixture(t)
	f.insertMessages(3)
	f.exec(`UPDATE outbox_cursor SET owner = 'relay one', epoch = 7, published = 42, parked = 5,
		lease_expires_at = clock_timestamp() + interval '1 h', lease = '1 h'`)
	f.wantOutput(0, "outbox status", `SHARD +RELAY +EPOCH`, `0 +relay one +7 +3 +\S+ +42 +5 +20\d\d-`,
		`3 messages wait to be published, the oldest for`)
	var status outboxStatus
	f.runJSON(0, "outbox status", &status)
	if len(status.Shards) != 1 || status.Backlog != 3 || status.Lag <= 0 ||
		status.Shards[0].Owner != "relay one" || status.Shards[0].Epoch != 7 {
		t.Errorf("got %+v", status)
	}
}

func TestOutboxRepair(t *testing.T) {
	f := newFixture(t)
	f.wantOutput(0, "outbox repair", `^nothing to repair: .*\n$`)
	var answer map[string]any
	f.runJSON(0, "outbox repair", &answer)
	if answer["repaired"] != false {
		t.Errorf("got %v", answer)
	}
	f.insertMessages(2)
	f.exec(`UPDATE outbox_cursor SET system_identifier = 1`)
	f.wantOutput(0, "outbox repair", `^repaired: 2 messages will be published`)
	f.exec(`UPDATE outbox_cursor SET system_identifier = 1`)
	f.runJSON(0, "outbox repair", &answer)
	if answer["repaired"] != true || answer["to_publish"] != 2.0 {
		t.Errorf("got %v", answer)
	}
	f.wantRows("t", `SELECT (system_identifier <> 1)::text::char(1) FROM outbox_cursor`)
}

func TestOutboxShards(t *testing.T) {
	f := newFixture(t)
	f.wantOutput(0, "outbox shards", `0 +0 +in use +0 +-`)
	f.wantOutput(0, "outbox shards 2", `0 +0 +retired, not drained yet`,
		`1 +1 +waits for older shards`, `2 +1 +waits for older shards`)
	f.exec(`UPDATE outbox_cursor SET drained = true WHERE shard = 0`)
	var answer struct{ Shards []ops.Shard }
	f.runJSON(0, "outbox shards", &answer)
	if len(answer.Shards) != 3 || !answer.Shards[0].Drained || answer.Shards[2].Generation != 1 {
		t.Errorf("got %+v", answer)
	}
	f.wantOutput(0, "outbox shards", `0 +0 +drained`, `1 +1 +in use`)

	tx, err := f.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer tx.Rollback(context.WithoutCancel(t.Context()))
	if _, err := tx.Exec(t.Context(), `SELECT outbox_insert('type', '', '')`); err != nil {
		t.Fatal(err)
	}
	f.wantOutput(1, "outbox shards 3 --timeout=2s",
		`outbox is in use: a transaction that has inserted messages stays open`)
}

func TestOutboxReplay(t *testing.T) {
	f := newFixture(t)
	ids := f.insertMessages(3)
	f.markDelivered()
	f.insertMessages(1) // left to the relay
	f.wantOutput(0, "outbox replay --dry-run", `^3 messages would be published\n$`)
	if _, exists := testenv.Management(t, f.amqpURL).Queue(app.ServiceName + "." + f.group.Name); exists {
		t.Error("a dry run has declared a queue")
	}
	f.wantOutput(0, "outbox replay --group="+f.group.Name,
		"^3 messages published again to the queue of "+f.group.Name+" alone\n$")
	if got := f.takeAll(f.group.Name); !slices.Equal(got, []string{" " + ids[0], " " + ids[1], " " + ids[2]}) {
		t.Errorf("in the queue: %q", got)
	}
	f.wantOutput(0, "outbox replay --id="+ids[2]+" --id="+ids[1]+" --rate=1000", `^2 messages published again\n$`)
	if got := f.takeAll(f.group.Name); !slices.Equal(got, []string{"events " + ids[1], "events " + ids[2]}) {
		t.Errorf("in the queue: %q", got)
	}
	if got := f.takeAll(f.other.Name); len(got) != 0 {
		t.Errorf("in the queue of %s: %q", f.other.Name, got)
	}
	for args, n := range map[string]int{
		"--key=k --key=other": 3, "--key=other": 0, "--type=" + f.group.Types[0]: 3, "--type=other.Type": 0,
		"--since=1h": 3, "--until=1h": 0, "--since=2000-01-01 --until=2000-01-02T00:00": 0,
	} {
		var answer map[string]any
		f.runJSON(0, "outbox replay --dry-run "+args, &answer)
		if answer["to_publish"] != float64(n) || answer["complete"] != true {
			t.Errorf("%s: %v", args, answer)
		}
	}
	var answer map[string]any
	f.runJSON(0, "outbox replay --id="+ids[0], &answer)
	if answer["published"] != 1.0 || answer["unroutable"] != 0.0 || answer["dry_run"] != false {
		t.Errorf("got %v", answer)
	}
	f.exec(`SELECT outbox_insert('other.Type'::text, '', ''::bytea)`)
	f.markDelivered()
	f.wantOutput(0, "outbox replay --dry-run", `^5 messages`)
	f.wantOutput(0, "outbox replay --dry-run --group="+f.group.Name, `^4 messages`) // only the types that it handles
	f.wantOutput(0, "outbox replay --dry-run --group="+f.group.Name+" --type="+f.group.Types[0], `^4 messages`)
	f.wantOutput(2, "outbox replay --group="+f.group.Name+" --type=other.Type",
		`--type: group `+f.group.Name+` does not handle "other.Type", only`)
	f.wantOutput(2, "outbox replay --group=nobody", `--group: there is no consumer group "nobody", only `+f.group.Name)
	f.wantOutput(1, "outbox replay --dry-run --after=77:1", `the outbox has no shard 77`)
}

// A replay that is interrupted by Ctrl-C can be continued.
func TestInterruptedReplayContinues(t *testing.T) {
	f := newFixture(t)
	const all = 450
	f.exec(`SELECT outbox_insert($1::text, '', ''::bytea) FROM generate_series(1, $2)`, f.group.Types[0], all)
	f.markDelivered()
	queue := app.ServiceName + "." + f.group.Name
	command := exec.CommandContext(t.Context(), binary(), "outbox", "replay", "--rate=100")
	var stderr bytes.Buffer
	command.Env, command.Stderr = f.environment, &stderr
	if err := command.Start(); err != nil {
		t.Fatal(err)
	}
	testenv.Eventually(t, 20*time.Second, func() error {
		if n := f.queueDepth(queue); n <= 100 { // messages of the second page: the first is confirmed
			return fmt.Errorf("%d messages", n)
		}
		return command.Process.Signal(syscall.SIGINT)
	})
	_ = command.Wait()
	report := regexp.MustCompile(
		`^shop: interrupted; (\d+) messages published again; continue with the same command and --after=(0:\d+)\n$`)
	found := report.FindStringSubmatch(stderr.String())
	if command.ProcessState.ExitCode() != 1 || found == nil {
		t.Fatalf("exit status %d: %s", command.ProcessState.ExitCode(), &stderr)
	}
	published, _ := strconv.Atoi(found[1])
	f.wantOutput(0, "outbox replay --rate=100000 --after="+found[2],
		fmt.Sprintf(`^%d messages published again\n$`, all-published))
	taken := f.takeAll(f.group.Name)
	slices.Sort(taken)
	if n := len(slices.Compact(taken)); n != all {
		t.Errorf("%d of %d messages are in the queue", n, all)
	}
}
