package app

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"time"

	"example.com/shop/internal/ops"
	"github.com/jackc/pgx/v5/pgxpool"
)

// checkPause is the time between two attempts to check a database that is unavailable or not migrated yet.
const checkPause = time.Second

// afterDatabaseCheck returns a function that runs a part of a process if the inbox keeps its entries for longer than
// copies of a message may arrive, and if no sequence that numbers messages would return a number twice. Otherwise it
// returns an error: a relay would keep messages for replay that no consumer may apply, and a consumer would park
// messages that are new to it. The check runs once per process; parts wait for an unavailable database, as they would
// anyway.
func afterDatabaseCheck(ctx context.Context, db *pgxpool.Pool) func(part func(context.Context) error) error {
	check := sync.OnceValue(func() error {
		for warned := false; ; warned = true {
			_, err := ops.CheckRetention(ctx, db, longestRedelivery())
			if err == nil {
				err = ops.CheckSequences(ctx, db)
			}
			if err == nil || errors.Is(err, ops.ErrForgetful) || errors.Is(err, ops.ErrBehind) || ctx.Err() != nil {
				return err
			}
			if !warned {
				slog.WarnContext(ctx, "cannot check the database yet, waiting for it", "error", err)
			}
			select {
			case <-ctx.Done():
			case <-time.After(checkPause):
			}
		}
	})
	return func(part func(context.Context) error) error {
		err := check()
		switch {
		case ctx.Err() != nil:
			return nil // stopped while waiting
		case err != nil:
			return err
		}
		return part(ctx)
	}
}
