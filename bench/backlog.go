package main

import (
	"context"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
	amqp "github.com/rabbitmq/amqp091-go"
)

const (
	small, medium, large = 10_000, 100_000, 1_000_000
	heldMessages         = 30_000
)

var backlogRow = row{
	name:  "backlog",
	title: "Backlog",
	how: "The relay on backlogs of 10,000, 100,000 and 1,000,000 messages. Each round publishes the first 100,000 of " +
		"the largest backlog, which isolates the cost of a message while a million wait. One run publishes all of it. " +
		"During that run the benchmark empties the queue every second, as consumers would, because a queue of a " +
		"million " +
		"messages slows its publishers down.",
	limit: "RabbitMQ, as without a backlog: the relay finds a page by index, however many messages wait behind it.",
	contestants: []contestant{
		{name: "10k", run: drain(small, 1)},
		{name: "100k", run: drain(medium, 1)},
		{name: "1M, first 100k", run: drainFirst(large, medium)},
		{name: "1M", run: drainAll(large), once: true},
	},
	lines: []line{
		{label: "10,000", contestant: "10k", metric: rate, unit: "msg/s"},
		{label: "100,000", contestant: "100k", metric: rate, unit: "msg/s", against: "10k"},
		{label: "1,000,000, the first 100,000", contestant: "1M, first 100k", metric: rate, unit: "msg/s",
			against: "100k", least: 0.9},
		{label: "1,000,000, all", contestant: "1M", metric: rate, unit: "msg/s", against: "100k", least: 0.9},
		{label: "1,000,000, all: resident", contestant: "1M", metric: memory, unit: "MiB", most: 100},
	},
}

func drainFirst(n, part int) func(ctx context.Context, b *bench) (measured, error) {
	return func(ctx context.Context, b *bench) (measured, error) { return drainDisturbed(ctx, b, n, part, 1, nil) }
}

func drainAll(n int) func(ctx context.Context, b *bench) (measured, error) {
	return func(ctx context.Context, b *bench) (measured, error) {
		return drainDisturbed(ctx, b, n, n, 1, func(ctx context.Context, _ string) (func(), error) {
			return b.keepEmpty(ctx)
		})
	}
}

// keepEmpty purges the queue every second until end is called.
func (b *bench) keepEmpty(ctx context.Context) (end func(), err error) {
	conn, err := amqp.Dial(b.AMQPURL)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	var emptying sync.WaitGroup
	emptying.Go(func() {
		for ctx.Err() == nil {
			if ch, err := conn.Channel(); err == nil {
				_, _ = ch.QueuePurge(queue, false) // closes the channel if the queue does not exist yet
				_ = ch.Close()
			}
			select {
			case <-ctx.Done():
			case <-time.After(time.Second):
			}
		}
	})
	return func() { cancel(); emptying.Wait(); _ = conn.Close() }, nil
}

var heldRow = row{
	name:  "held",
	title: "Held transactions",
	how: "A backlog of 30,000 messages drains beside an open transaction that began before the first message was " +
		"published: a REPEATABLE READ transaction that has read something (a report, a dump, a forgotten psql), or one " +
		"that has inserted a message of its own. The SKIP LOCKED loop of the peers row is there for comparison.",
	limit: "RabbitMQ, as without such a transaction: the log leaves no dead rows to skip, and the relay finds the " +
		"cursor by ctid. The rows that the loop deletes stay, and each scan passes them again.",
	contestants: []contestant{
		{name: "relay", run: drain(heldMessages, 1)},
		{name: "relay, snapshot", run: drainHeld(holdSnapshot)},
		{name: "relay, write", run: drainHeld(holdWrite)},
		{name: "loop", run: drainPeer(skipLocked, heldMessages, nil)},
		{name: "loop, snapshot", run: drainPeer(skipLocked, heldMessages, holdSnapshot)},
	},
	lines: []line{
		{label: "relay, nothing held", contestant: "relay", metric: rate, unit: "msg/s"},
		{label: "relay, snapshot held", contestant: "relay, snapshot", metric: rate, unit: "msg/s",
			against: "relay", least: 0.9},
		{label: "relay, write transaction open", contestant: "relay, write", metric: rate, unit: "msg/s",
			against: "relay", least: 0.9},
		{label: "SKIP LOCKED loop, nothing held", contestant: "loop", metric: rate, unit: "msg/s", against: "relay"},
		{label: "SKIP LOCKED loop, snapshot held", contestant: "loop, snapshot", metric: rate, unit: "msg/s",
			against: "loop"},
	},
}

// disturbance brings a database into a state, and returns the function that ends it.
type disturbance = func(ctx context.Context, url string) (end func(), err error)

func drainHeld(disturb disturbance) func(ctx context.Context, b *bench) (measured, error) {
	return func(ctx context.Context, b *bench) (measured, error) {
		return drainDisturbed(ctx, b, heldMessages, heldMessages, 1, disturb)
	}
}

func holdSnapshot(ctx context.Context, url string) (func(), error) {
	return hold(ctx, url, `BEGIN ISOLATION LEVEL REPEATABLE READ`, `SELECT count(*) FROM pg_class`)
}

func holdWrite(ctx context.Context, url string) (func(), error) {
	return hold(ctx, url, `BEGIN`, `SELECT outbox_insert('`+messageType+`', 'held', '')`)
}

func hold(ctx context.Context, url string, statements ...string) (func(), error) {
	conn, err := pgx.Connect(ctx, url)
	if err != nil {
		return nil, err
	}
	end := func() { _ = conn.Close(context.WithoutCancel(ctx)) }
	for _, sql := range statements {
		if _, err := conn.Exec(ctx, sql); err != nil {
			end()
			return nil, err
		}
	}
	return end, nil
}
