package operations

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"sync"
	"time"

	"connectrpc.com/connect/v2"
	"example.com/shop/internal/bounds"
	"example.com/shop/internal/deadletter"
	operationsv1 "example.com/shop/internal/gen/shop/operations/v1"
	"example.com/shop/internal/inbox"
	"example.com/shop/internal/messaging"
	"example.com/shop/internal/postgres"
	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"golang.org/x/sync/semaphore"
)

// WorkerConfig sets up a Worker.
type WorkerConfig struct {
	// Concurrency is how many calls are executed at once. Each call uses a connection for its transaction and sometimes a
	// second one, so the pool must have twice as many. Default 8.
	Concurrency int
	// Limits are the same for single methods, by their name in Operation.method. Calls over the limit wait in the queue.
	// Default none.
	Limits map[string]int
	// Retention is how long an operation is stored after its end. Default 7 days.
	Retention time.Duration
	// Inbox configures how often, and for how long, a call is tried. The worker sets OnDead.
	Inbox inbox.Config
}

// Worker executes calls as the consumer group "operations". Any number of processes may run one. The limits apply to
// each process.
type Worker struct {
	db         *pgxpool.Pool
	operations *Operations
	server     *connect.Server
	config     WorkerConfig
	box        *inbox.Inbox
	all        *semaphore.Weighted
	limits     map[string]*semaphore.Weighted
}

// Consumer is the name of the consumer group. MessageType is its only message type. The order of messages does not
// matter.
const (
	Consumer    = "operations"
	MessageType = "shop.operations.v1.OperationSubmitted"
)

// NewWorker makes a Worker on db, which must be the pool that the server's handlers use: their transactions become
// parts of the worker's. The server should have the interceptors that calls from outside pass through, except for
// those that identify the caller: the worker restores it.
func NewWorker(db *pgxpool.Pool, operations *Operations, server *connect.Server, config WorkerConfig) *Worker {
	config.Concurrency = cmp.Or(config.Concurrency, defaultConcurrency)
	config.Retention = cmp.Or(config.Retention, 7*24*time.Hour)
	w := &Worker{
		db: db, operations: operations, server: server, config: config,
		all: semaphore.NewWeighted(int64(config.Concurrency)), limits: map[string]*semaphore.Weighted{},
	}
	for method, limit := range config.Limits {
		w.limits[method] = semaphore.NewWeighted(int64(limit))
	}
	group := inbox.NewGroup(Consumer)
	inbox.Handle(group, w.execute)
	config.Inbox.OnDead = w.giveUp
	w.box = inbox.New(db, group, config.Inbox)
	return w
}

const defaultConcurrency = 8

// Prefetch returns how many deliveries the worker should have at once. It is more than the worker executes, so that
// calls of a method at its limit do not block the calls behind them.
func (c WorkerConfig) Prefetch() int { return 8 * cmp.Or(c.Concurrency, defaultConcurrency) }

// admitted marks a context whose call has passed enter already.
type admitted struct{}

// Process settles deliveries as inbox.Inbox.Process does, each as soon as enter admits its call. It waits for enter
// without a transaction.
func (w *Worker) Process(ctx context.Context, deliveries []messaging.Delivery) error {
	for _, delivery := range deliveries {
		message := &operationsv1.OperationSubmitted{}
		_ = bounds.Unmarshal(delivery.Payload, message) // without a method on error; the inbox rejects the payload
		leave, err := w.enter(ctx, message.GetMethod())
		if err != nil {
			return err
		}
		err = w.box.Process(context.WithValue(ctx, admitted{}, true), []messaging.Delivery{delivery})
		leave()
		if err != nil {
			return err
		}
	}
	return nil
}

// Drain stores messages that the broker gave up delivering. See inbox.Inbox.Drain.
func (w *Worker) Drain(ctx context.Context, deliveries []messaging.Delivery) error {
	return w.box.Drain(ctx, deliveries)
}

// WhileResumed runs part while operators have not paused the group. See inbox.Inbox.WhileResumed.
func (w *Worker) WhileResumed(ctx context.Context, part func(ctx context.Context) error) error {
	return w.box.WhileResumed(ctx, part)
}

// enter waits until the limits admit a call of method. It waits for the method's own limit first, so that calls that
// wait there take no place from others.
func (w *Worker) enter(ctx context.Context, method string) (leave func(), err error) {
	own := w.limits[method]
	if own != nil {
		if err := own.Acquire(ctx, 1); err != nil {
			return nil, err
		}
	}
	if err := w.all.Acquire(ctx, 1); err != nil {
		if own != nil {
			own.Release(1)
		}
		return nil, err
	}
	return func() {
		w.all.Release(1)
		if own != nil {
			own.Release(1)
		}
	}, nil
}

// sweepInterval is the time between two sweeps of one process.
const sweepInterval = 10 * time.Minute

// Run retries failed calls, and deletes operations after their retention, until ctx is done.
func (w *Worker) Run(ctx context.Context) error {
	var chores sync.WaitGroup
	defer chores.Wait()
	chores.Go(func() {
		for ctx.Err() == nil {
			if err := w.sweep(ctx); err != nil && ctx.Err() == nil {
				slog.WarnContext(ctx, "operations not swept; the table grows until they are", "error", err)
			}
			select {
			case <-ctx.Done():
			case <-time.After(sweepInterval + rand.N(time.Minute)):
			}
		}
	})
	return w.box.Run(ctx)
}

func (w *Worker) sweep(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	var forgotten int
	err := postgres.Transact(ctx, w.db, func(tx pgx.Tx) error { // for its isolation level
		return tx.QueryRow(ctx, `SELECT operation_sweep($1)`, w.config.Retention).Scan(&forgotten)
	})
	if err != nil {
		return fmt.Errorf("sweep operations: %w", err)
	}
	if forgotten > 0 {
		slog.InfoContext(ctx, "operations swept", "forgotten", forgotten)
	}
	return nil
}

const giveUpSQL = `
UPDATE operation SET state = 'failed', request = '', error = coalesce(error, $2), ended_at = clock_timestamp()
WHERE id = $1 AND state IN ('pending', 'running')`

// giveUp ends an operation whose message became a dead letter. The result is the error of the last attempt, if there
// was one.
func (w *Worker) giveUp(ctx context.Context, tx pgx.Tx, letter deadletter.Letter) error {
	id, err := uuid.Parse(letter.MessageID)
	if err != nil {
		return nil // not the message of an operation
	}
	status := &operationsv1.Status{Code: int32(connect.CodeInternal), Message: "given up: the call did not complete"}
	if letter.Reason == deadletter.OutsideWindow || letter.Reason == deadletter.Undelivered {
		status = &operationsv1.Status{
			Code: int32(connect.CodeUnavailable), Message: "given up: no worker executed the call in time",
		}
	}
	tag, err := tx.Exec(ctx, giveUpSQL, id, encode(status))
	if err != nil {
		return fmt.Errorf("give up operation: %w", err)
	}
	w.operations.topic.Touch(tx, id.String())
	message := &operationsv1.OperationSubmitted{}
	if err := bounds.Unmarshal(letter.Payload, message); err != nil || message.GetOperationId() != id.String() ||
		tag.RowsAffected() == 0 {
		return nil // not readable, or ended before
	}
	return w.notify(ctx, tx, message)
}
