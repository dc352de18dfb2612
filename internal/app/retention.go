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

// retentionPause is the time between two attempts to ask a database that is away, or that is not migrated yet.
const retentionPause = time.Second

// whenRemembered returns a function that runs a part of a process once it is known that the inbox remembers for longer
// than copies of a message may come, and refuses if it does not: a relay would keep for replay what nobody may apply,
// and a consumer would bury what is new to it. It refuses as well while the numbers that order messages would be drawn
// twice. The database is asked once a process; while it is away, parts wait for it, as they would anyway.
func whenRemembered(ctx context.Context, db *pgxpool.Pool) func(part func(context.Context) error) error {
	remembered := sync.OnceValue(func() error {
		for warned := false; ; warned = true {
			_, err := ops.CheckRetention(ctx, db, longestRedelivery())
			if err == nil {
				err = ops.CheckSequences(ctx, db)
			}
			if err == nil || errors.Is(err, ops.ErrForgetful) || errors.Is(err, ops.ErrBehind) || ctx.Err() != nil {
				return err
			}
			if !warned {
				slog.WarnContext(ctx, "not known whether the database is fit, waiting for it", "error", err)
			}
			select {
			case <-ctx.Done():
			case <-time.After(retentionPause):
			}
		}
	})
	return func(part func(context.Context) error) error {
		err := remembered()
		switch {
		case ctx.Err() != nil:
			return nil // stopped while waiting
		case err != nil:
			return err
		}
		return part(ctx)
	}
}
