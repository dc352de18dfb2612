package app

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"time"

	"example.com/shop/internal/ops"
	"example.com/shop/migrations"
	"github.com/jackc/pgx/v5/pgxpool"
)

// checkPause is the time between two attempts to check a database that is unavailable or not migrated yet.
const checkPause = time.Second

// waitFor calls check until it returns nil, an error that is final, or ctx is done, in which case it returns nil.
func waitFor(ctx context.Context, check func() error, final func(error) bool) error {
	for warned := false; ; warned = true {
		err := check()
		switch {
		case err == nil, ctx.Err() != nil:
			return nil
		case final(err):
			return err
		case !warned:
			slog.WarnContext(ctx, "cannot check the database yet, waiting for it", "error", err)
		}
		select {
		case <-ctx.Done():
		case <-time.After(checkPause):
		}
	}
}

// awaitSchema returns a function that waits until the schema fits this binary. It returns an error if only another
// binary or another database can help. The check runs once per process.
func awaitSchema(ctx context.Context, db *pgxpool.Pool) func() error {
	return sync.OnceValue(func() error {
		return waitFor(ctx, func() error { return migrations.Check(ctx, db) }, migrations.IsFinal)
	})
}

// afterDatabaseCheck returns a function that runs a part of a process once schema has returned nil, if the inbox keeps
// its entries for longer than copies of a message may arrive, and if no sequence that numbers messages would return a
// number twice. Otherwise it returns an error: a relay would keep messages for replay that no consumer may apply, and a
// consumer would park messages that are new to it. The check runs once per process; parts wait for an unavailable
// database, as they would anyway.
func afterDatabaseCheck(
	ctx context.Context, db *pgxpool.Pool, schema func() error,
) func(part func(context.Context) error) error {
	check := sync.OnceValue(func() error {
		if err := schema(); err != nil {
			return err
		}
		return waitFor(ctx, func() error {
			if _, err := ops.CheckRetention(ctx, db, longestRedelivery()); err != nil {
				return err
			}
			return ops.CheckSequences(ctx, db)
		}, func(err error) bool { return errors.Is(err, ops.ErrForgetful) || errors.Is(err, ops.ErrBehind) })
	})
	return func(part func(context.Context) error) error {
		if err := check(); err != nil {
			return err
		}
		if ctx.Err() != nil {
			return nil // stopped while waiting
		}
		return part(ctx)
	}
}
