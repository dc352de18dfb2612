package orders

import (
	"context"
	"errors"
	"fmt"
	"time"

	"connectrpc.com/connect/v2"
	ordersv1 "example.com/shop/internal/gen/orders/v1"
	"example.com/shop/internal/inbox"
	"example.com/shop/internal/messaging"
	"example.com/shop/internal/outbox"
	"example.com/shop/internal/postgres"
	"github.com/jackc/pgx/v5"
	"google.golang.org/protobuf/types/known/timestamppb"
)

const setStockSQL = `
INSERT INTO stock (sku, total) VALUES ($1, $2)
-- If more than the new total is reserved, nothing changes and no row is returned.
ON CONFLICT (sku) DO UPDATE SET total = excluded.total WHERE stock.reserved <= excluded.total
RETURNING sku, total, reserved, free`

// SetStock implements orders.v1.OrderService.
func (s *Service) SetStock(ctx context.Context, req *ordersv1.SetStockRequest) (*ordersv1.SetStockResponse, error) {
	var stock *ordersv1.Stock
	err := postgres.Transact(ctx, s.db, func(tx pgx.Tx) (err error) {
		stock, err = readStock(ctx, tx, setStockSQL, req.GetSku(), req.GetTotal())
		return err
	})
	if errors.Is(err, pgx.ErrNoRows) {
		return nil, connect.Errorf(connect.CodeFailedPrecondition, "more than %d pieces of %s are reserved",
			req.GetTotal(), req.GetSku())
	}
	if err != nil {
		return nil, fmt.Errorf("set stock: %w", err)
	}
	return &ordersv1.SetStockResponse{Stock: stock}, nil
}

const getStockSQL = `SELECT sku, total, reserved, free FROM stock WHERE sku = $1`

// GetStock implements orders.v1.OrderService.
func (s *Service) GetStock(ctx context.Context, req *ordersv1.GetStockRequest) (*ordersv1.GetStockResponse, error) {
	stock, err := readStock(ctx, s.db, getStockSQL, req.GetSku())
	if errors.Is(err, pgx.ErrNoRows) {
		return nil, connect.Errorf(connect.CodeNotFound, "no stock of %s has been set", req.GetSku())
	}
	if err != nil {
		return nil, postgres.Classify(fmt.Errorf("get stock: %w", err))
	}
	return &ordersv1.GetStockResponse{Stock: stock}, nil
}

func readStock(ctx context.Context, db interface {
	QueryRow(ctx context.Context, sql string, args ...any) pgx.Row
}, sql string, args ...any) (*ordersv1.Stock, error) {
	var stock ordersv1.Stock
	err := db.QueryRow(ctx, sql, args...).Scan(&stock.Sku, &stock.Total, &stock.Reserved, &stock.Free)
	return &stock, err
}

// Fulfillment returns the consumer group that reserves stock for placed orders and releases the stock of cancelled
// orders.
func (s *Service) Fulfillment() *inbox.Group {
	group := inbox.NewGroup("fulfillment")
	inbox.Handle(group, s.reserve)
	inbox.Handle(group, release)
	return group
}

// lockSQL locks an order against CancelOrder, and then the stock of its lines. It locks stock in the order of SKUs, so
// that two orders cannot deadlock. If the order was cancelled before, it locks no stock.
const lockSQL = `
WITH placed AS MATERIALIZED (
    SELECT id FROM orders WHERE id = $1 AND status = 'placed' FOR UPDATE
)
SELECT FROM stock WHERE sku IN (SELECT sku FROM order_lines JOIN placed ON order_id = placed.id)
ORDER BY sku FOR UPDATE`

// reserveSQL is separate from lockSQL because a statement sees the data as of its start. The stock may change while
// lockSQL waits for locks; reserveSQL starts after that and sees the change.
const reserveSQL = `
WITH wanted AS MATERIALIZED (
    SELECT id, sku, quantity FROM orders JOIN order_lines ON order_id = id WHERE id = $1 AND status = 'placed'
), verdict AS MATERIALIZED (
    -- Always one row: short lists the SKUs with too little stock, and is NULL if there is enough of each.
    SELECT string_agg(sku, ', ' ORDER BY sku) AS short
    FROM wanted LEFT JOIN stock USING (sku) WHERE coalesce(free, 0) < quantity
), reserved AS (
    UPDATE stock SET reserved = stock.reserved + wanted.quantity FROM wanted, verdict
    WHERE stock.sku = wanted.sku AND short IS NULL
), held AS (
    INSERT INTO reservations (order_id, sku, quantity)
    SELECT wanted.id, wanted.sku, wanted.quantity FROM wanted, verdict WHERE short IS NULL
)
UPDATE orders SET
    status = CASE WHEN short IS NULL THEN 'confirmed' ELSE 'rejected' END,
    reject_reason = coalesce('not enough stock: ' || short, ''),
    updated_at = clock_timestamp()
FROM verdict WHERE id = $1 AND status = 'placed'
RETURNING customer_id, reject_reason, updated_at`

// reserve confirms an order and reserves stock for all its lines, or rejects the order and reserves nothing.
func (s *Service) reserve(ctx context.Context, tx pgx.Tx, event *ordersv1.OrderPlaced) error {
	var customer, reason string
	var at time.Time
	var statements pgx.Batch // one round trip for both
	statements.Queue(lockSQL, event.GetOrderId())
	statements.Queue(reserveSQL, event.GetOrderId()).QueryRow(func(row pgx.Row) error {
		return row.Scan(&customer, &reason, &at)
	})
	err := tx.SendBatch(ctx, &statements).Close()
	switch {
	case errors.Is(err, pgx.ErrNoRows):
		return nil // the order was cancelled before
	case err != nil:
		return fmt.Errorf("reserve stock: %w", err)
	}
	s.watched.Touch(tx, event.GetOrderId())
	if reason != "" {
		return outbox.Insert(ctx, tx, messaging.New(event.GetOrderId(), &ordersv1.OrderRejected{
			OrderId: event.GetOrderId(), CustomerId: customer, Reason: reason, RejectedAt: timestamppb.New(at),
		}))
	}
	return outbox.Insert(ctx, tx, messaging.New(event.GetOrderId(), &ordersv1.OrderConfirmed{
		OrderId: event.GetOrderId(), CustomerId: customer, ConfirmedAt: timestamppb.New(at),
	}))
}

const releaseSQL = `
WITH released AS (
    DELETE FROM reservations WHERE order_id = $1 RETURNING sku, quantity
), locked AS MATERIALIZED (
    SELECT sku FROM stock WHERE sku IN (SELECT sku FROM released) ORDER BY sku FOR UPDATE -- same order as lockSQL
)
UPDATE stock SET reserved = stock.reserved - released.quantity
FROM locked JOIN released USING (sku) WHERE stock.sku = locked.sku`

// release releases the stock that a cancelled order has reserved. It does nothing if the order was cancelled before
// reserve ran.
func release(ctx context.Context, tx pgx.Tx, event *ordersv1.OrderCancelled) error {
	if _, err := tx.Exec(ctx, releaseSQL, event.GetOrderId()); err != nil {
		return fmt.Errorf("release stock: %w", err)
	}
	return nil
}

// Notifications returns the consumer group that records one notification for each confirmed or rejected order.
func (s *Service) Notifications() *inbox.Group {
	group := inbox.NewGroup("notifications")
	inbox.Handle(group, func(ctx context.Context, tx pgx.Tx, event *ordersv1.OrderConfirmed) error {
		return notify(ctx, tx, "confirmed", event)
	})
	inbox.Handle(group, func(ctx context.Context, tx pgx.Tx, event *ordersv1.OrderRejected) error {
		return notify(ctx, tx, "rejected", event)
	})
	return group
}

// notify records a notification. It needs no guard against duplicates, because the inbox applies each event once.
func notify(ctx context.Context, tx pgx.Tx, kind string, event interface {
	GetOrderId() string
	GetCustomerId() string
}) error {
	_, err := tx.Exec(ctx, `INSERT INTO notifications (order_id, kind, customer_id) VALUES ($1, $2, $3)`,
		event.GetOrderId(), kind, event.GetCustomerId())
	if err != nil {
		return fmt.Errorf("record notification: %w", err)
	}
	return nil
}
