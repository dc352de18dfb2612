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

// failure is an error of a handler. Any other error comes from the database.
type failure struct{ error }

func (f *failure) Unwrap() error { return f.error }

// run runs the handler. It returns a *failure, unless the database or the end of ctx is to blame.
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
	// Wait for an unavailable database. An error that merely looks like one counts as the handler's failure, and so does
	// a busy database: waiting for these might never end.
	if postgres.IsAway(tx, err) {
		return err
	}
	return &failure{err}
}

// blameHandlers turns an error at COMMIT into a *failure if the handlers had run to their end: Postgres refused their
// work, for example because of a deferred constraint.
func blameHandlers(err error, ran bool) error {
	for _, other := range []error{
		postgres.ErrOutcomeUnknown, postgres.ErrUnavailable, context.Canceled, context.DeadlineExceeded,
	} {
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
// would fail every time, and the batch would be passed again and again.
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
				cause = fmt.Sprintf("%T", cause) // it may be a message, whose content must not be logged
			}
			err = fmt.Errorf("handler panicked: %v", cause)
			slog.ErrorContext(ctx, "handler panicked", "consumer", b.group.name, "message_id", delivery.ID,
				"panic", cause, "stack", string(debug.Stack()))
		}
	}()
	return b.group.handle(ctx, tx, delivery)
}
