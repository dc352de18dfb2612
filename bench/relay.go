package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"time"

	"example.com/orders/internal/messaging"
	"example.com/orders/internal/outbox"
	"example.com/orders/internal/postgres"
	"example.com/orders/internal/rabbit"
	"example.com/orders/migrations"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	amqp "github.com/rabbitmq/amqp091-go"
)

const (
	database = "orders_bench"
	exchange = "bench"
	queue    = "bench.relay"
)

// relayCommand is the relay as the service runs it.
type relayCommand struct{}

func (c *relayCommand) Run(ctx context.Context, f *flags) error {
	db, err := postgres.Open(ctx, postgres.Config{URL: f.PostgresURL, GenericPlans: true})
	if err != nil {
		return err
	}
	defer db.Close()
	topology := rabbit.Topology{Exchange: exchange, Queues: []rabbit.Queue{{Name: queue, Types: []string{"google.protobuf.BytesValue"}}}}
	newPublisher := func() messaging.Publisher {
		return rabbit.NewPublisher(rabbit.PublisherConfig{URL: f.AMQPURL, Topology: topology, Window: outbox.MaxInFlight(outbox.Config{})})
	}
	return outbox.NewRelay(db, newPublisher, outbox.Config{}).Run(ctx)
}

// measureRelay lets a relay of its own process drain a backlog. The clock runs from the cursor's first move to its last, as the
// database tells it, so that the start of the process does not count.
func measureRelay(ctx context.Context, f *flags, messages []messaging.Message) (result, error) {
	url, err := freshDatabase(ctx, f.PostgresURL)
	if err != nil {
		return result{}, err
	}
	db, err := postgres.Open(ctx, postgres.Config{URL: url})
	if err != nil {
		return result{}, err
	}
	defer db.Close()
	if err := fill(ctx, db, messages); err != nil {
		return result{}, err
	}
	defer deleteQueues(f.AMQPURL)
	self, err := os.Executable()
	if err != nil {
		return result{}, err
	}
	child := exec.Command(self, "relay")
	child.Env = append(os.Environ(), "POSTGRES_URL="+url, "AMQP_URL="+f.AMQPURL)
	child.Stderr = os.Stderr
	child.Stdout = os.Stdout
	started := time.Now()
	if err := child.Start(); err != nil {
		return result{}, err
	}
	defer func() {
		_ = child.Process.Signal(syscall.SIGINT)
		_ = child.Wait()
	}()
	var claimed time.Time
	for {
		var published int
		var now time.Time
		var isClaimed bool
		err := db.QueryRow(ctx, `SELECT sum(published), bool_or(claimed IS NOT NULL), clock_timestamp() FROM outbox_cursor`).Scan(&published, &isClaimed, &now)
		if err != nil {
			return result{}, err
		}
		if isClaimed && claimed.IsZero() {
			claimed = now
		}
		if published == len(messages) {
			return result{took: now.Sub(claimed), maxRSS: maxRSS(child.Process.Pid)}, nil
		}
		if time.Since(started) > 5*time.Minute {
			return result{}, fmt.Errorf("published %d of %d after 5 minutes", published, len(messages))
		}
		time.Sleep(20 * time.Millisecond) // seldom enough to cost the measured one nothing
	}
}

func freshDatabase(ctx context.Context, url string) (string, error) {
	conn, err := pgx.Connect(ctx, url)
	if err != nil {
		return "", err
	}
	defer conn.Close(ctx)
	for _, sql := range []string{"DROP DATABASE IF EXISTS " + database + " WITH (FORCE)", "CREATE DATABASE " + database} {
		if _, err := conn.Exec(ctx, sql); err != nil {
			return "", err
		}
	}
	config := conn.Config()
	fresh := fmt.Sprintf("host=%s port=%d user=%s password=%s dbname=%s", config.Host, config.Port, config.User, quote(config.Password), database)
	_, err = migrations.Up(ctx, fresh)
	return fresh, err
}

func quote(s string) string { return "'" + strings.NewReplacer(`\`, `\\`, `'`, `\'`).Replace(s) + "'" }

func fill(ctx context.Context, db *pgxpool.Pool, messages []messaging.Message) error {
	for len(messages) > 0 {
		n := min(500, len(messages))
		err := postgres.Transact(ctx, db, func(tx pgx.Tx) error { return outbox.Insert(ctx, tx, messages[:n]...) })
		if err != nil {
			return err
		}
		messages = messages[n:]
	}
	// A checkpoint now, rather than in the middle of the measurement.
	_, err := db.Exec(ctx, `CHECKPOINT`)
	return err
}

func deleteQueues(url string) {
	conn, err := amqp.Dial(url)
	if err != nil {
		return
	}
	defer conn.Close()
	ch, err := conn.Channel()
	if err != nil {
		return
	}
	for _, name := range []string{queue, rabbit.DeadQueue(queue)} {
		_, _ = ch.QueueDelete(name, false, false, false)
	}
}

// maxRSS is the most memory that a process has had resident, in MiB.
func maxRSS(pid int) float64 {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(status)) {
		if rest, ok := strings.CutPrefix(line, "VmHWM:"); ok {
			kib, _ := strconv.ParseFloat(strings.Fields(rest)[0], 64)
			return kib / 1024
		}
	}
	return 0
}
