package inbox

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime/debug"

	"example.com/shop/internal/messaging"
	"example.com/shop/internal/postgres"
	"github.com/jackc/pgx/v5"
)

// failure is what a handler failed with; any other error is the database's.
type failure struct{ error }

func (f *failure) Unwrap() error { return f.error }

// run runs the handler. What it returns is a *failure, unless the database or the end of ctx is to blame.
func (b *Inbox) run(ctx context.Context, tx pgx.Tx, delivery messaging.Delivery) error {
	limited, cancel := context.WithTimeout(ctx, b.config.HandlerTimeout)
	defer cancel()
	err := b.traced(limited, delivery, func(ctx context.Context) error { return b.runSafely(ctx, tx, delivery) })
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case err == nil:
		return committable(tx)
	case limited.Err() != nil:
		return &failure{fmt.Errorf("handler ran longer than %s: %w", b.config.HandlerTimeout, err)}
	}
	// A database that is away is waited for. An error that only looks like it is the handler's failure, and so is a
	// database that is busy: waiting for either might never end.
	if postgres.IsAway(tx, err) {
		return err
	}
	return &failure{err}
}

// blameHandlers makes the handlers' failure of what Postgres refuses at COMMIT although they ran to their end, as it
// does when a deferred constraint does not hold.
func blameHandlers(err error, ran bool) error {
	for _, other := range []error{postgres.ErrOutcomeUnknown, postgres.ErrUnavailable, context.Canceled, context.DeadlineExceeded} {
		if errors.Is(err, other) {
			return err
		}
	}
	if err == nil || !ran {
		return err
	}
	return &failure{err}
}

// committable returns a *failure if the handler returned nil but left a transaction that cannot be committed. COMMIT
// would fail each time, and the batch be handed in again and again.
func committable(tx pgx.Tx) error {
	if err := postgres.Committable(tx); err != nil {
		return &failure{fmt.Errorf("the handler returned nil, but its transaction cannot be committed: %w", err)}
	}
	return nil
}

func (b *Inbox) runSafely(ctx context.Context, tx pgx.Tx, delivery messaging.Delivery) (err error) {
	defer func() {
		if cause := recover(); cause != nil {
			switch cause.(type) {
			case error, string:
			default:
				cause = fmt.Sprintf("%T", cause) // a message, perhaps: what is in it is not for the log
			}
			err = fmt.Errorf("handler panicked: %v", cause)
			slog.ErrorContext(ctx, "handler panicked", "consumer", b.group.name, "message_id", delivery.ID, "panic", cause, "stack", string(debug.Stack()))
		}
	}()
	return b.group.handle(ctx, tx, delivery)
}
