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
func (p *Processor) run(ctx context.Context, tx pgx.Tx, delivery messaging.Delivery) error {
	limited, cancel := context.WithTimeout(ctx, p.config.HandlerTimeout)
	defer cancel()
	err := p.runSafely(limited, tx, delivery)
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case err == nil:
		return committable(tx)
	case limited.Err() != nil:
		return &failure{fmt.Errorf("handler ran longer than %s: %w", p.config.HandlerTimeout, err)}
	case isDatabaseAway(tx, err):
		return err
	}
	return &failure{err}
}

// isDatabaseAway tells whether err comes of this database being away. An error that only looks like it, such as the io.EOF of a
// handler that parses a file or calls another service, is the handler's: waiting for the database to come back would be for ever.
func isDatabaseAway(tx pgx.Tx, err error) bool {
	var refused *pgconn.PgError
	return errors.Is(postgres.Classify(err), postgres.ErrUnavailable) && (tx.Conn().IsClosed() || errors.As(err, &refused))
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

func (p *Processor) runSafely(ctx context.Context, tx pgx.Tx, delivery messaging.Delivery) (err error) {
	defer func() {
		if cause := recover(); cause != nil {
			slog.ErrorContext(ctx, "handler panicked", "consumer", p.group.name, "message_id", delivery.ID, "panic", cause, "stack", string(debug.Stack()))
			err = fmt.Errorf("handler panicked: %v", cause)
		}
	}()
	return p.group.handle(ctx, tx, delivery)
}
