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
	PostgresURL postgresURL   `name:"postgres-url" env:"POSTGRES_URL" required:"" help:"Direct connection to Postgres."`
	Shards      int           `env:"OUTBOX_SHARDS" default:"0" help:"${shards}"`
	Wait        time.Duration `env:"MIGRATE_WAIT" default:"0s" help:"${migrate_wait}"`
}

func (c *migrateCommand) Validate() error {
	if err := between("--wait", c.Wait, 0, 24*time.Hour); err != nil {
		return err
	}
	return between("--shards", c.Shards, 0, ops.MaxShards)
}

// shardsTimeout is how long migrate waits for open transactions that have inserted messages.
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
		fmt.Printf("the outbox now has %d shards\n", c.Shards)
	}
	return err
}

func (c *migrateCommand) Run(ctx context.Context) error {
	applied, err := c.up(ctx)
	for _, name := range applied {
		fmt.Println("applied", name)
	}
	if err != nil {
		return err
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

// up migrates as soon as it can connect, and tries to connect for c.Wait. A server that is still being set up fails in
// many ways: its port is closed, or the database or the role does not exist yet.
func (c *migrateCommand) up(ctx context.Context) (applied []string, err error) {
	started := time.Now()
	for warned := false; ; warned = true {
		applied, err = migrations.Up(ctx, string(c.PostgresURL))
		if !errors.Is(postgres.Classify(err), postgres.ErrUnavailable) || time.Since(started) > c.Wait {
			return applied, err
		}
		if !warned {
			slog.WarnContext(ctx, "postgres is unreachable, waiting for it", "error", err, "for", c.Wait)
		}
		select {
		case <-ctx.Done():
			return nil, err
		case <-time.After(waitPause):
		}
	}
}
