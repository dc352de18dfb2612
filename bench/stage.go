package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"

	"example.com/shop/internal/postgres"
	"example.com/shop/internal/rabbit"
	"example.com/shop/migrations"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	amqp "github.com/rabbitmq/amqp091-go"
)

// bench gives contestants their databases, queues and processes.
type bench struct {
	*flags
	quick     bool
	binary    string
	templates map[string]string // databases that this run filled, by content
}

// some returns n, or a tenth of it for a quick run.
func (b *bench) some(n int) int {
	if b.quick {
		return max(1, n/10)
	}
	return n
}

const (
	database = "orders_bench"
	// nothing names the content of an empty database, see withDatabase.
	nothing = "nothing"
)

// withDatabase calls fn with the URL of a database that prepare has filled. It prepares each content once a run and
// hands out copies: every contestant begins with the same rows in the same places, and none waits for inserts.
func (b *bench) withDatabase(
	ctx context.Context, content string, prepare func(ctx context.Context, url string) error, fn func(url string) error,
) error {
	template, ready := b.templates[content]
	if !ready {
		template = fmt.Sprintf("%s_template_%d", database, len(b.templates))
		if err := b.admin(ctx, `DROP DATABASE IF EXISTS `+template+` WITH (FORCE)`, `CREATE DATABASE `+
			template); err != nil {
			return err
		}
		url := b.urlOf(template)
		if err := prepare(ctx, url); err != nil {
			return fmt.Errorf("prepare %s: %w", content, err)
		}
		// Do now what autovacuum would do later. Skip empty tables: Postgres would plan for an empty table and keep that
		// plan, which is a bad one, while the table fills.
		if content != nothing {
			if err := execute(ctx, url, `VACUUM ANALYZE`); err != nil {
				return err
			}
		}
		b.templates[content] = template
	}
	// Copy files. The default strategy copies through the log, and Postgres would still be writing a large copy when the
	// measurement begins.
	err := b.admin(ctx, `DROP DATABASE IF EXISTS `+database+` WITH (FORCE)`,
		`CREATE DATABASE `+database+` TEMPLATE `+template+` STRATEGY file_copy`, `CHECKPOINT`)
	if err != nil {
		return err
	}
	return fn(b.urlOf(database))
}

func (b *bench) close() {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	_ = b.admin(ctx, `DROP DATABASE IF EXISTS `+database+` WITH (FORCE)`)
	for _, template := range b.templates {
		_ = b.admin(ctx, `DROP DATABASE IF EXISTS `+template+` WITH (FORCE)`)
	}
}

func (b *bench) admin(ctx context.Context, statements ...string) error {
	return execute(ctx, b.PostgresURL, statements...)
}

func execute(ctx context.Context, url string, statements ...string) error {
	conn, err := pgx.Connect(ctx, url)
	if err != nil {
		return err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	for _, sql := range statements {
		if _, err := conn.Exec(ctx, sql); err != nil {
			return fmt.Errorf("%.40s: %w", sql, err)
		}
	}
	return nil
}

func (b *bench) urlOf(name string) string {
	config, err := pgx.ParseConfig(b.PostgresURL)
	if err != nil {
		return b.PostgresURL // connecting to it returns the error
	}
	quote := strings.NewReplacer(`\`, `\\`, `'`, `\'`).Replace
	return fmt.Sprintf("host='%s' port=%d user='%s' password='%s' dbname=%s",
		quote(config.Host), config.Port, quote(config.User), quote(config.Password), name)
}

func migrated(ctx context.Context, url string) error {
	_, err := migrations.Up(ctx, url)
	return err
}

// withPool calls fn with a pool that is set up like the service's.
func withPool(ctx context.Context, config postgres.Config, fn func(db *pgxpool.Pool) error) error {
	db, err := postgres.Open(ctx, config)
	if err != nil {
		return err
	}
	defer db.Close()
	return fn(db)
}

const (
	exchange = "bench"
	queue    = "bench.queue"
)

// topology is that of a service with one consumer group. All contestants publish over the same route to the same kind
// of queue.
var topology = rabbit.Topology{Exchange: exchange, Queues: []rabbit.Queue{{Name: queue, Types: []string{messageType}}}}

// withQueue declares the topology, calls fn with empty queues and deletes them.
func (b *bench) withQueue(ctx context.Context, topology rabbit.Topology, fn func() error) error {
	b.deleteQueues(topology)
	if err := topology.Declare(ctx, b.AMQPURL); err != nil {
		return err
	}
	defer b.deleteQueues(topology)
	return fn()
}

func (b *bench) deleteQueues(topology rabbit.Topology) {
	conn, err := amqp.Dial(b.AMQPURL)
	if err != nil {
		return
	}
	defer conn.Close()
	for _, queue := range topology.Queues {
		for _, name := range []string{queue.Name, rabbit.DeadQueue(queue.Name)} {
			if ch, err := conn.Channel(); err == nil {
				_, _ = ch.QueueDelete(name, false, false, false)
			}
		}
	}
	if ch, err := conn.Channel(); err == nil {
		_ = ch.ExchangeDelete(topology.Exchange, false, false)
	}
}

// withProcess calls fn while a process runs.
func withProcess(command *exec.Cmd, environment []string, fn func(pid int) error) error {
	command.Env = append(os.Environ(), environment...)
	command.Stderr = os.Stderr
	if err := command.Start(); err != nil {
		return err
	}
	defer func() {
		_ = command.Process.Signal(syscall.SIGINT)
		_ = command.Wait()
	}()
	return fn(command.Process.Pid)
}
