package main

import (
	"context"
	"fmt"
	"os/exec"
	"time"

	"github.com/jackc/pgx/v5"
)

const (
	idleWindow = 20 * time.Second
	idleSettle = 5 * time.Second
)

var idleRow = row{
	name:  "idle",
	title: "Idle",
	how: fmt.Sprintf("API, relay and consumer run as three idle processes of the binary. The row reads from /proc the "+
		"processor time that they use in %s, after %s to settle down. Postgres: the time that their backends use "+
		"meanwhile.", idleWindow, idleSettle),
	limit: "Polls once a second (relay, backlog, scheduled messages, retries), heartbeats and leases.",
	contestants: []contestant{
		{name: "processes", run: runIdle},
	},
	lines: []line{
		{label: "api, relay and consumer together", contestant: "processes", metric: "processes", unit: "% of a core",
			most: 2},
		{label: "api", contestant: "processes", metric: "api", unit: "% of a core"},
		{label: "relay", contestant: "processes", metric: "relay", unit: "% of a core"},
		{label: "consumer", contestant: "processes", metric: "consumer", unit: "% of a core"},
		{label: "Postgres' backends for them", contestant: "processes", metric: "postgres", unit: "% of a core"},
	},
}

var idleProcesses = []string{"api", "relay", "consumer"}

func runIdle(ctx context.Context, b *bench) (found measured, err error) {
	err = b.withDatabase(ctx, nothing, migrated, func(url string) error {
		defer b.deleteQueues(serviceTopology)
		return b.withService(url, "127.0.0.1:0", idleProcesses, nil, func(pids []int) error {
			found, err = idleTimes(ctx, url, pids)
			return err
		})
	})
	return found, err
}

// withService calls fn while the named processes of the service run. The API listens on addr. started contains the
// PIDs of the processes that already run.
func (b *bench) withService(url, addr string, names []string, started []int, fn func(pids []int) error) error {
	if len(started) == len(names) {
		return fn(started)
	}
	name := names[len(started)]
	environment := []string{
		"POSTGRES_URL=" + url, "AMQP_URL=" + b.AMQPURL, "EXCHANGE=" + exchange,
		"OPS_LISTEN=127.0.0.1:0", "LOG_LEVEL=error",
	}
	if name == "api" {
		environment = append(environment, "LISTEN="+addr, "INSECURE_NO_AUTH=true", "CALLER_RATE=0")
	}
	return withProcess(exec.Command(b.binary, name), environment, func(pid int) error {
		return b.withService(url, addr, names, append(started, pid), fn)
	})
}

// idleTimes measures the processes and their Postgres backends.
func idleTimes(ctx context.Context, url string, pids []int) (measured, error) {
	conn, err := pgx.Connect(ctx, url)
	if err != nil {
		return nil, err
	}
	defer conn.Close(ctx)
	time.Sleep(idleSettle)
	rows, _ := conn.Query(ctx, `
		SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()`)
	backends, err := pgx.CollectRows(rows, pgx.RowTo[int])
	if err != nil {
		return nil, err
	}
	began := time.Now()
	before, err := cpuTimes(append(pids, backends...))
	if err != nil {
		return nil, err
	}
	time.Sleep(idleWindow)
	after, err := cpuTimes(append(pids, backends...))
	if err != nil {
		return nil, err
	}
	found := measured{}
	percent := 100 / time.Since(began).Seconds()
	for i := range after {
		used := (after[i] - before[i]).Seconds() * percent
		if i < len(pids) {
			found[idleProcesses[i]] = used
			found["processes"] += used
		} else {
			found["postgres"] += used
		}
	}
	return found, nil
}

// cpuTimes returns the CPU time of each process. A process that has ended is an error.
func cpuTimes(pids []int) (all []time.Duration, err error) {
	for _, pid := range pids {
		used, err := cpuTime(pid)
		if err != nil {
			return nil, err
		}
		all = append(all, used)
	}
	return all, nil
}
