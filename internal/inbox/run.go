package inbox

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime/debug"

	"example.com/orders/internal/messaging"
	"example.com/orders/internal/postgres"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
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
	case isDatabaseAway(tx, err):
		return err
	}
	return &failure{err}
}

// isDatabaseAway tells whether err comes of this database being away, or unable to write at all. An error that only looks like it is the
// handler's: the io.EOF of one that parses a file, a failure of another database, or locks without number. Waiting for the database to come back would
// be for ever.
func isDatabaseAway(tx pgx.Tx, err error) bool {
	if tx.Conn().IsClosed() {
		return errors.Is(postgres.Classify(err), postgres.ErrUnavailable)
	}
	return tx.Conn().PgConn().TxStatus() == 'E' && cannotWrite(err) // else the error came over another connection
}

// cannotWrite tells whether Postgres is read-only or its disk full.
func cannotWrite(err error) bool {
	var refused *pgconn.PgError
	return errors.As(err, &refused) && (refused.Code == "25006" || refused.Code == "53100")
}

// blameHandlers makes the handlers' failure of what Postgres refuses at COMMIT although they ran to their end, as it does when a deferred
// constraint does not hold.
func blameHandlers(err error, ran bool) error {
	var refused *pgconn.PgError
	if !ran || !errors.As(err, &refused) || errors.Is(err, postgres.ErrOutcomeUnknown) || cannotWrite(err) {
		return err
	}
	return &failure{err}
}

// committable returns a *failure if the handler returned nil but left a transaction that cannot be committed. COMMIT would fail each
// time, and the batch be handed in again for ever.
func committable(tx pgx.Tx) error {
	conn := tx.Conn().PgConn()
	switch {
	case conn.IsClosed():
		return &failure{errors.New("the handler returned nil although its connection was closed, as by a deadline of its own on a statement")}
	case conn.IsBusy():
		return &failure{errors.New("the handler returned nil without closing the rows of a query")}
	case conn.TxStatus() == 'E':
		return &failure{errors.New("the handler returned nil although a statement of its transaction failed")}
	case conn.TxStatus() != 'T':
		return &failure{errors.New("the handler returned nil but had ended the transaction, which is not its own")}
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
