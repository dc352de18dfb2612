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
	// Concurrency is how many calls are executed at once. Each takes a connection for its transaction and, now and then, another: the pool must have
	// twice as many. Default 8.
	Concurrency int
	// Limits is the same for single methods, by the name that Operation.method has. What is over the limit waits in the queue. Default none.
	Limits map[string]int
	// Retention is how long an operation is kept after its end. Default 7 days.
	Retention time.Duration
	// Inbox says how often a call is tried, and for how long. Its OnDead is the worker's own.
	Inbox inbox.Config
}

// Worker executes calls: it is the consumer group "operations". Any number of processes may run one; the limits hold for each.
type Worker struct {
	db         *pgxpool.Pool
	operations *Operations
	server     *connect.Server
	config     WorkerConfig
	box        *inbox.Inbox
	all        *semaphore.Weighted
	limits     map[string]*semaphore.Weighted
}

// Consumer is the name of the consumer group, and MessageType the one type that it wants. The order of its messages means nothing.
const (
	Consumer    = "operations"
	MessageType = "shop.operations.v1.OperationSubmitted"
)

// NewWorker makes a Worker on db, which must be the pool that server's handlers use: their transactions become parts of the worker's. The server
// should have the interceptors that calls from outside go through, except for those that find out who the caller is: it is known.
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

// Prefetch is how many deliveries the worker should have at once: more than it executes, so that calls of a method that is at its limit do not
// keep others waiting behind them.
func (c WorkerConfig) Prefetch() int { return 8 * cmp.Or(c.Concurrency, defaultConcurrency) }

// admitted marks a context whose call has its turn already.
type admitted struct{}

// Process settles deliveries as inbox.Inbox.Process does, and each of them when its call has its turn. It waits for that without a transaction.
func (w *Worker) Process(ctx context.Context, deliveries []messaging.Delivery) error {
	for _, one := range deliveries {
		message := &operationsv1.OperationSubmitted{}
		_ = bounds.Unmarshal(one.Payload, message) // what cannot be decoded has no method, and is the inbox's to judge
		leave, err := w.enter(ctx, message.GetMethod())
		if err != nil {
			return err
		}
		err = w.box.Process(context.WithValue(ctx, admitted{}, true), []messaging.Delivery{one})
		leave()
		if err != nil {
			return err
		}
	}
	return nil
}

// Drain keeps what the broker gave up delivering: see inbox.Inbox.Drain.
func (w *Worker) Drain(ctx context.Context, deliveries []messaging.Delivery) error {
	return w.box.Drain(ctx, deliveries)
}

// WhileResumed runs part while operators have not paused the group: see inbox.Inbox.WhileResumed.
func (w *Worker) WhileResumed(ctx context.Context, part func(ctx context.Context) error) error {
	return w.box.WhileResumed(ctx, part)
}

// enter waits for the turn of a call of method: at its own limit first, so that who waits there takes no place from others.
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

// Run tries again what failed, and forgets what ended long ago, until ctx is done.
func (w *Worker) Run(ctx context.Context) error {
	var chores sync.WaitGroup
	defer chores.Wait()
	chores.Go(func() {
		for ctx.Err() == nil {
			if err := w.sweep(ctx); err != nil && ctx.Err() == nil {
				slog.WarnContext(ctx, "operations not swept, they grow until they are", "error", err)
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

// giveUp ends an operation whose message is dead: with the error of its last attempt, if there was one.
func (w *Worker) giveUp(ctx context.Context, tx pgx.Tx, letter deadletter.Letter) error {
	id, err := uuid.Parse(letter.MessageID)
	if err != nil {
		return nil // not a message of ours
	}
	status := &operationsv1.Status{Code: int32(connect.CodeInternal), Message: "given up: it did not come to an end"}
	if letter.Reason == deadletter.OutsideWindow || letter.Reason == deadletter.Undelivered {
		status = &operationsv1.Status{Code: int32(connect.CodeUnavailable), Message: "given up: no worker executed it in time"}
	}
	if _, err := tx.Exec(ctx, giveUpSQL, id, encode(status)); err != nil {
		return fmt.Errorf("give up operation: %w", err)
	}
	w.operations.topic.Touch(tx, id.String())
	return nil
}
