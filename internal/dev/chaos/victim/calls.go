package main

import (
	"context"
	"log/slog"
	"time"

	"connectrpc.com/connect/v2"
	"example.com/shop/internal/changes"
	"example.com/shop/internal/dev/probe"
	"example.com/shop/internal/inbox"
	"example.com/shop/internal/operations"
	"example.com/shop/internal/outbox"
	"example.com/shop/internal/rabbit"
	"example.com/shop/internal/rpcserver"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"golang.org/x/sync/errgroup"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

const calls = "victim.operations"

func init() {
	roles["worker"] = runWorker
	topology.Queues = append(topology.Queues, rabbit.Queue{
		Name: calls, Types: []string{operations.MessageType}, Unordered: true,
	})
}

func runWorker(ctx context.Context, running *errgroup.Group, db *pgxpool.Pool) error {
	worker := newWorker(db)
	consumer := rabbit.NewConsumer(rabbit.ConsumerConfig{
		URL: amqpURL, Topology: topology, Queue: calls, Name: "victim worker", Unordered: true, Prefetch: 32,
	}, worker.Process)
	running.Go(func() error { return consumer.Run(ctx) })
	running.Go(func() error { return worker.Run(ctx) })
	return nil
}

func newWorker(db *pgxpool.Pool) *operations.Worker {
	out := outbox.NewWriter(db, nil, nil)
	server := connect.NewServer(rpcserver.Interceptors(slog.Default())...)
	probe.Handle(server, probe.Mutate, func(ctx context.Context, text string) (string, error) {
		err := out.Transact(ctx, func(tx pgx.Tx) error {
			if err := apply(ctx, tx, wrapperspb.String(text)); err != nil {
				return err
			}
			_, err := tx.Exec(ctx, `SELECT pg_sleep(0.02)`) // makes kills in the middle of a call likely
			return err
		})
		return text, err
	})
	store := operations.New(db, out, changes.New(changes.Config{}), operations.Config{})
	return operations.NewWorker(db, store, server, operations.WorkerConfig{
		Concurrency: 4, Inbox: inbox.Config{PollInterval: 20 * time.Millisecond, HandlerTimeout: 2 * time.Second},
	})
}
