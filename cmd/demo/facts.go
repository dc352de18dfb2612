//go:build unix

package main

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"time"

	"example.com/shop/internal/changes"
	"example.com/shop/internal/inbox"
	"example.com/shop/internal/orders"
	"example.com/shop/internal/rabbit"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

// facts contains the state after the run: acknowledged calls, rows of the tables, and messages that the tap saw.
type facts struct {
	acked         []string // IDs of acknowledged orders
	orders        []order
	messages      []message // by ID
	published     int
	parked        int
	copies        int // messages seen by the tap, duplicates included
	arrivals      []arrival
	taken         []taken
	notifications []notification
	stock         []stock
	initial       map[string]int // pieces of each SKU before the load
	deadLetters   int
	retrying      int
	queued        map[string]int    // messages left, by queue
	groups        map[string]string // consumer group by message type
}

type order struct{ ID, Status string }

// message is a row of the outbox.
type message struct {
	ID        int64
	MessageID string
	Type      string
	Key       string
	CreatedAt time.Time
}

// taken is a row of the inbox.
type taken struct {
	Consumer   string
	MessageID  string
	Copies     int
	ReceivedAt time.Time
}

type notification struct{ OrderID, Kind string }

// stock is a row of stock, with the sums that it must agree with.
type stock struct {
	SKU       string
	Total     int
	Free      int
	Reserved  int
	Held      int // sum of the reservations
	Confirmed int // sum of the confirmed orders
}

const stockSQL = `
SELECT sku, total, free, reserved,
       (SELECT coalesce(sum(quantity), 0) FROM reservations WHERE reservations.sku = stock.sku) AS held,
       (SELECT coalesce(sum(quantity), 0) FROM order_lines JOIN orders ON orders.id = order_id
        WHERE order_lines.sku = stock.sku AND orders.status = 'confirmed') AS confirmed
FROM stock WHERE $1::text[] IS NULL OR sku = ANY($1) ORDER BY sku`

// readFacts reads the state after the run.
func (d *demo) readFacts(ctx context.Context) (f facts, err error) {
	db := d.watch.db
	now, err := d.watch.sample(ctx)
	if err != nil {
		return f, err
	}
	f.acked, f.initial = d.load.acked, d.load.plan.stock
	f.published, f.parked, f.retrying = now.Published, now.Parked, now.Retrying
	f.copies, f.arrivals = d.tap.all()
	ours, skus := d.watch.orders, []string(nil)
	if ours != nil {
		skus = slices.Collect(maps.Keys(f.initial))
	}
	f.orders, err = read[order](ctx, db, `
		SELECT id::text, status FROM orders WHERE $1::uuid[] IS NULL OR id = ANY($1)`, ours)
	if err != nil {
		return f, err
	}
	f.messages, err = read[message](ctx, db, `SELECT id, message_id::text, type, key, created_at FROM outbox
		WHERE $1::text[] IS NULL OR key = ANY($1) ORDER BY id`, ours)
	if err != nil {
		return f, err
	}
	f.taken, err = read[taken](ctx, db, `SELECT consumer, message_id::text, copies, received_at FROM inbox
		WHERE $1::text[] IS NULL OR message_id IN (SELECT message_id FROM outbox WHERE key = ANY($1))`, ours)
	if err != nil {
		return f, err
	}
	f.notifications, err = read[notification](ctx, db,
		`SELECT order_id::text, kind FROM notifications WHERE $1::uuid[] IS NULL OR order_id = ANY($1)`, ours)
	if err != nil {
		return f, err
	}
	if f.stock, err = read[stock](ctx, db, stockSQL, skus); err != nil {
		return f, err
	}
	err = db.QueryRow(ctx, `
		SELECT count(*) FROM dead_letter WHERE $1::text[] IS NULL OR key = ANY($1)`, ours).Scan(&f.deadLetters)
	if err != nil {
		return f, fmt.Errorf("count dead letters: %w", err)
	}
	return f, d.readQueues(&f)
}

// readQueues reads the depth of each queue.
func (d *demo) readQueues(f *facts) (err error) {
	f.groups, f.queued = map[string]string{}, map[string]int{}
	for _, group := range groups() {
		for _, kind := range group.Types() {
			f.groups[kind] = group.Name()
		}
		for _, queue := range []string{queueOf(group), rabbit.DeadQueue(queueOf(group))} {
			if f.queued[queue], err = d.tap.depth(queue); err != nil {
				return err
			}
		}
	}
	return nil
}

// groups returns the service's consumer groups.
func groups() []*inbox.Group {
	service := orders.NewService(nil, nil, changes.New(changes.Config{}), orders.Config{}) // only describes its groups
	return []*inbox.Group{service.Fulfillment(), service.Notifications()}
}

func queueOf(group *inbox.Group) string { return "shop." + group.Name() }

func read[T any](ctx context.Context, db *pgxpool.Pool, sql string, args ...any) ([]T, error) {
	rows, _ := db.Query(ctx, sql, args...) // CollectRows returns its error
	found, err := pgx.CollectRows(rows, pgx.RowToStructByPos[T])
	if err != nil {
		return nil, fmt.Errorf("read the tables: %w", err)
	}
	return found, nil
}
