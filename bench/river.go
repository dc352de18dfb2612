package main

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"time"

	"example.com/shop/internal/messaging"
	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/riverqueue/river"
	"github.com/riverqueue/river/riverdriver/riverpgxv5"
	"github.com/riverqueue/river/rivermigrate"
)

// River as an outbox: the business transaction inserts a job. Its worker publishes the message and waits for the
// confirm.
var (
	riverDefault = newRiver("river", 100, 0)
	riverTuned   = newRiver("river tuned", 500, river.FetchCooldownMin)
)

// riverJob is a message as River stores it.
type riverJob struct {
	ID      uuid.UUID `json:"id"`
	Type    string    `json:"type"`
	Key     string    `json:"key"`
	Payload []byte    `json:"payload"`
}

func (riverJob) Kind() string { return "publish" }

// riverWorker publishes over a channel that all workers share, which pipelines their confirms.
type riverWorker struct {
	river.WorkerDefaults[riverJob]
	to        *confirming
	confirmed func(id string)
}

func (w *riverWorker) Work(ctx context.Context, job *river.Job[riverJob]) error {
	m := messaging.Message{
		ID: job.Args.ID, Type: job.Args.Type, Key: job.Args.Key, Payload: job.Args.Payload, CreatedAt: job.CreatedAt,
	}
	confirm, err := w.to.publish(m)
	if err != nil {
		return err
	}
	acked, err := confirm.WaitContext(ctx)
	if err == nil && !acked {
		err = fmt.Errorf("not confirmed")
	}
	if err == nil {
		w.confirmed(m.ID.String())
	}
	return err
}

func newRiver(name string, workers int, cooldown time.Duration) peer {
	return peer{
		name: name,
		prepare: func(ctx context.Context, url string) error {
			db, err := pgxpool.New(ctx, url)
			if err != nil {
				return err
			}
			defer db.Close()
			migrator, err := rivermigrate.New(riverpgxv5.New(db), &rivermigrate.Config{Logger: quiet})
			if err != nil {
				return err
			}
			_, err = migrator.Migrate(ctx, rivermigrate.DirectionUp, nil)
			return err
		},
		insert: openRiver,
		relay: func(ctx context.Context, b *bench, url string, confirmed func(id string)) error {
			return runRiver(ctx, b, url, river.QueueConfig{MaxWorkers: workers, FetchCooldown: cooldown}, confirmed)
		},
	}
}

// quiet discards the log lines that River writes at each shutdown.
var quiet = slog.New(slog.NewTextHandler(io.Discard, nil))

func openRiver(ctx context.Context, url string) (insertFunc, func(), error) {
	db, err := pgxpool.New(ctx, url)
	if err != nil {
		return nil, nil, err
	}
	client, err := river.NewClient(riverpgxv5.New(db), &river.Config{Logger: quiet})
	if err != nil {
		return nil, nil, err
	}
	return func(ctx context.Context, messages ...messaging.Message) error {
		jobs := make([]river.InsertManyParams, len(messages))
		for i, m := range messages {
			jobs[i].Args = riverJob{m.ID, m.Type, m.Key, m.Payload}
		}
		return pgx.BeginFunc(ctx, db, func(tx pgx.Tx) error {
			_, err := client.InsertManyFastTx(ctx, tx, jobs)
			return err
		})
	}, db.Close, nil
}

func runRiver(ctx context.Context, b *bench, url string, queue river.QueueConfig, confirmed func(id string)) error {
	to, err := openConfirming(b.AMQPURL)
	if err != nil {
		return err
	}
	defer to.close()
	config, err := pgxpool.ParseConfig(url)
	if err != nil {
		return err
	}
	config.MaxConns = 20
	db, err := pgxpool.NewWithConfig(ctx, config)
	if err != nil {
		return err
	}
	defer db.Close()
	workers := river.NewWorkers()
	river.AddWorker(workers, &riverWorker{to: to, confirmed: confirmed})
	client, err := river.NewClient(riverpgxv5.New(db), &river.Config{
		Queues: map[string]river.QueueConfig{river.QueueDefault: queue}, Workers: workers, Logger: quiet,
	})
	if err != nil {
		return err
	}
	if err := client.Start(context.WithoutCancel(ctx)); err != nil {
		return err
	}
	<-ctx.Done()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
	defer cancel()
	return client.StopAndCancel(ctx)
}
