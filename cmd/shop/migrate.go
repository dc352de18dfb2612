package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"example.com/shop/internal/ops"
	"example.com/shop/internal/postgres"
	"example.com/shop/migrations"
)

type migrateCommand struct {
	PostgresURL postgresURL   `name:"postgres-url" env:"POSTGRES_URL" required:"" help:"Postgres to work on, as a direct connection."`
	Shards      int           `env:"OUTBOX_SHARDS" default:"0" help:"Shards to spread the outbox over, 0 to 64: at most so many relays work at once. 0 leaves it as it is, 1 at first."`
	Wait        time.Duration `env:"MIGRATE_WAIT" default:"0s" help:"How long to wait for a Postgres that does not answer or lets nobody in yet, 0s to 24h."`
}

func (c *migrateCommand) Validate() error {
	if err := between("--wait", c.Wait, 0, 24*time.Hour); err != nil {
		return err
	}
	return between("--shards", c.Shards, 0, ops.MaxShards)
}

// shardsTimeout is how long migrate waits for transactions that have inserted and stay open.
const shardsTimeout = time.Minute

func (c *migrateCommand) spread(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, shardsTimeout)
	defer cancel()
	db, err := postgres.Open(ctx, postgres.Config{URL: string(c.PostgresURL), MaxConns: 1})
	if err != nil {
		return err
	}
	defer db.Close()
	changed, err := ops.EnsureShards(ctx, db, c.Shards)
	if changed && err == nil {
		fmt.Printf("outbox is spread over %d shards from now on\n", c.Shards)
	}
	return err
}

func (c *migrateCommand) Run(ctx context.Context) error {
	applied, err := c.up(ctx)
	if err != nil {
		return err
	}
	for _, name := range applied {
		fmt.Println("applied", name)
	}
	if len(applied) == 0 {
		fmt.Println("schema is up to date")
	}
	if c.Shards == 0 {
		return nil
	}
	return c.spread(ctx)
}

// waitPause is the time between two attempts to reach Postgres.
const waitPause = time.Second

// up migrates as soon as it can connect, for as long as it may wait. A server that is only being set up refuses in many ways: nobody listens, or it
// does not know the database or the role.
func (c *migrateCommand) up(ctx context.Context) (applied []string, err error) {
	started := time.Now()
	for warned := false; ; warned = true {
		applied, err = migrations.Up(ctx, string(c.PostgresURL))
		if !errors.Is(postgres.Classify(err), postgres.ErrUnavailable) || time.Since(started) > c.Wait {
			return applied, err
		}
		if !warned {
			slog.WarnContext(ctx, "postgres cannot be reached, waiting for it", "error", err, "for", c.Wait)
		}
		select {
		case <-ctx.Done():
			return nil, err
		case <-time.After(waitPause):
		}
	}
}
