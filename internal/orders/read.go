package orders

import (
	"context"
	"errors"
	"fmt"
	"time"

	"connectrpc.com/connect/v2"
	"example.com/shop/internal/changes"
	ordersv1 "example.com/shop/internal/gen/orders/v1"
	"example.com/shop/internal/gen/orders/v1/ordersv1connect"
	"example.com/shop/internal/postgres"
	"github.com/jackc/pgx/v5"
	"google.golang.org/protobuf/types/known/timestamppb"
)

// WatchOrder implements orders.v1.OrderService. All watchers in a process share the queries that read changed orders.
func (s *Service) WatchOrder(
	ctx context.Context, req *ordersv1.WatchOrderRequest, stream ordersv1connect.OrderServiceWatchOrderServerStream,
) error {
	id, err := parseID(req.GetOrderId())
	if err != nil {
		return err
	}
	for order, err := range s.watched.Watch(ctx, id) {
		if errors.Is(err, changes.ErrNotFound) {
			return notFound(id)
		}
		if err != nil {
			return err
		}
		if err := stream.Send(&ordersv1.WatchOrderResponse{Order: order}); err != nil {
			return err
		}
		switch order.GetStatus() {
		case ordersv1.OrderStatus_ORDER_STATUS_REJECTED, ordersv1.OrderStatus_ORDER_STATUS_CANCELLED:
			return nil
		}
	}
	return nil
}

const readSQL = `
SELECT o.id, o.customer_id, o.status, o.reject_reason, o.placed_at, o.updated_at,
       array_agg(l.sku ORDER BY l.sku), array_agg(l.quantity ORDER BY l.sku)
FROM orders o JOIN order_lines l ON l.order_id = o.id
WHERE o.id = ANY ($1)
GROUP BY o.id`

// querier is a pool or a transaction.
type querier interface {
	Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error)
}

// read returns the order with the ID, or a not_found error.
func read(ctx context.Context, db querier, id string) (*ordersv1.Order, error) {
	rows, _ := db.Query(ctx, readSQL, []string{id})
	order, err := pgx.CollectExactlyOneRow(rows, scanOrder)
	if errors.Is(err, pgx.ErrNoRows) {
		return nil, notFound(id)
	}
	if err != nil {
		return nil, postgres.Classify(fmt.Errorf("read order: %w", err))
	}
	return order, nil
}

// readAll implements changes.Read: it returns the orders that exist, by ID.
func (s *Service) readAll(ctx context.Context, ids []string) (map[string]*ordersv1.Order, error) {
	rows, _ := s.db.Query(ctx, readSQL, ids)
	orders, err := pgx.CollectRows(rows, scanOrder)
	if err != nil {
		return nil, postgres.Classify(fmt.Errorf("read watched orders: %w", err))
	}
	found := make(map[string]*ordersv1.Order, len(orders))
	for _, order := range orders {
		found[order.GetId()] = order
	}
	return found, nil
}

func notFound(id string) error {
	return connect.Errorf(connect.CodeNotFound, "order %s does not exist", id)
}

func scanOrder(row pgx.CollectableRow) (*ordersv1.Order, error) {
	var (
		order               ordersv1.Order
		status              string
		placedAt, updatedAt time.Time
		skus                []string
		quantities          []int32
	)
	err := row.Scan(&order.Id, &order.CustomerId, &status, &order.RejectReason, &placedAt, &updatedAt, &skus,
		&quantities)
	if err != nil {
		return nil, err
	}
	for i, sku := range skus {
		order.Lines = append(order.Lines, &ordersv1.Line{Sku: sku, Quantity: quantities[i]})
	}
	order.Status = parseStatus(status)
	order.PlacedAt, order.UpdatedAt = timestamppb.New(placedAt), timestamppb.New(updatedAt)
	return &order, nil
}
