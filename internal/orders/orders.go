// Package orders is the example domain. It contains RPC methods and message handlers, each next to its SQL.
//
// It guarantees three things. Stock is never oversold. An order ID identifies one order, however often a caller repeats
// PlaceOrder. Every change of an order commits together with the event that announces it.
//
// PlaceOrder returns before stock is reserved. The order stays in status placed until a consumer receives its event
// from the broker and confirms or rejects the order.
package orders

import (
	"cmp"
	"context"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"connectrpc.com/connect/v2"
	"example.com/shop/internal/changes"
	ordersv1 "example.com/shop/internal/gen/orders/v1"
	"example.com/shop/internal/gen/orders/v1/ordersv1connect"
	"example.com/shop/internal/messaging"
	"example.com/shop/internal/outbox"
	"example.com/shop/internal/postgres"
	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"
)

// Service implements orders.v1.OrderService. The proto file documents each method. Requests must satisfy its validation
// rules; the server checks them before it calls a method.
type Service struct {
	db      *pgxpool.Pool
	out     *outbox.Writer
	config  Config
	watched *changes.Topic[*ordersv1.Order]
}

// Config configures a Service.
type Config struct {
	// PageSize is how many orders ListOrders returns if the caller names no number. Default 50, at most 1000.
	PageSize int
}

var _ ordersv1connect.OrderServiceHandler = (*Service)(nil)

// NewService returns a Service that reads from db, writes through out, and notifies watchers through hub.
func NewService(db *pgxpool.Pool, out *outbox.Writer, hub *changes.Hub, config Config) *Service {
	config.PageSize = cmp.Or(config.PageSize, 50)
	s := &Service{db: db, out: out, config: config}
	s.watched = changes.NewTopic(hub, "order", s.readAll)
	return s
}

const placeSQL = `
WITH placed AS (
    -- Of several concurrent calls with the same ID, the first one inserts. The others wait here for its commit, and
    -- then get no row.
    INSERT INTO orders (id, customer_id) VALUES ($1, $2) ON CONFLICT (id) DO NOTHING RETURNING id, placed_at
), lines AS (
    INSERT INTO order_lines (order_id, sku, quantity)
    SELECT placed.id, line.sku, line.quantity FROM placed, unnest($3::text[], $4::int[]) AS line (sku, quantity)
)
SELECT placed_at FROM placed`

// PlaceOrder implements orders.v1.OrderService.
func (s *Service) PlaceOrder(
	ctx context.Context, req *ordersv1.PlaceOrderRequest,
) (*ordersv1.PlaceOrderResponse, error) {
	id, err := parseID(req.GetOrderId())
	if err != nil {
		return nil, err
	}
	lines, skus, quantities := sortLines(req.GetLines())
	var order *ordersv1.Order
	// While the backlog is full, TransactOnce runs repeat instead of the function below. repeat answers the call if an
	// earlier call placed the order.
	repeat := func(tx pgx.Tx) (found bool, err error) {
		order, err = samePlaced(ctx, tx, id, req.GetCustomerId(), lines)
		if connect.CodeOf(err) == connect.CodeNotFound {
			return false, nil
		}
		return true, err
	}
	err = s.out.TransactOnce(ctx, repeat, func(tx pgx.Tx) error {
		var placedAt time.Time
		err := tx.QueryRow(ctx, placeSQL, id, req.GetCustomerId(), skus, quantities).Scan(&placedAt)
		if errors.Is(err, pgx.ErrNoRows) {
			order, err = samePlaced(ctx, tx, id, req.GetCustomerId(), lines)
			return err
		}
		if err != nil {
			return fmt.Errorf("place order: %w", err)
		}
		at := timestamppb.New(placedAt)
		order = &ordersv1.Order{
			Id: id, CustomerId: req.GetCustomerId(), Lines: lines, Status: ordersv1.OrderStatus_ORDER_STATUS_PLACED,
			PlacedAt: at, UpdatedAt: at,
		}
		return outbox.Insert(ctx, tx, messaging.New(id, &ordersv1.OrderPlaced{
			OrderId: id, CustomerId: req.GetCustomerId(), Lines: lines, PlacedAt: at,
		}))
	})
	if err != nil {
		return nil, err
	}
	return &ordersv1.PlaceOrderResponse{Order: order}, nil
}

// samePlaced returns the order with the ID if its content is the same. It returns a not_found error if there is no such
// order, and an already_exists error if the content differs.
func samePlaced(ctx context.Context, tx pgx.Tx, id, customer string, lines []*ordersv1.Line) (*ordersv1.Order, error) {
	order, err := read(ctx, tx, id)
	if err != nil {
		return nil, err
	}
	same := slices.EqualFunc(order.GetLines(), lines, func(a, b *ordersv1.Line) bool { return proto.Equal(a, b) })
	if !same || order.GetCustomerId() != customer {
		return nil, connect.Errorf(connect.CodeAlreadyExists, "order %s already exists with different content", id)
	}
	return order, nil
}

// GetOrder implements orders.v1.OrderService.
func (s *Service) GetOrder(ctx context.Context, req *ordersv1.GetOrderRequest) (*ordersv1.GetOrderResponse, error) {
	id, err := parseID(req.GetOrderId())
	if err != nil {
		return nil, err
	}
	order, err := read(ctx, s.db, id)
	if err != nil {
		return nil, err
	}
	return &ordersv1.GetOrderResponse{Order: order}, nil
}

const cancelSQL = `
UPDATE orders SET status = 'cancelled', updated_at = clock_timestamp()
WHERE id = $1 AND status IN ('placed', 'confirmed')`

// CancelOrder implements orders.v1.OrderService. It releases no stock: the Fulfillment group does that when it receives
// the event.
func (s *Service) CancelOrder(
	ctx context.Context, req *ordersv1.CancelOrderRequest,
) (*ordersv1.CancelOrderResponse, error) {
	id, err := parseID(req.GetOrderId())
	if err != nil {
		return nil, err
	}
	var order *ordersv1.Order
	// repeat answers a call for an order cancelled before, as in PlaceOrder.
	repeat := func(tx pgx.Tx) (cancelled bool, err error) {
		order, err = read(ctx, tx, id)
		return order.GetStatus() == ordersv1.OrderStatus_ORDER_STATUS_CANCELLED, err
	}
	err = s.out.TransactOnce(ctx, repeat, func(tx pgx.Tx) error {
		changed, err := tx.Exec(ctx, cancelSQL, id)
		if err != nil {
			return fmt.Errorf("cancel order: %w", err)
		}
		if order, err = read(ctx, tx, id); err != nil {
			return err
		}
		switch {
		case changed.RowsAffected() == 1:
			s.watched.Touch(tx, id)
			return outbox.Insert(ctx, tx, messaging.New(id, &ordersv1.OrderCancelled{
				OrderId: id, CustomerId: order.GetCustomerId(), CancelledAt: order.GetUpdatedAt(),
			}))
		case order.GetStatus() == ordersv1.OrderStatus_ORDER_STATUS_REJECTED:
			return connect.Errorf(connect.CodeFailedPrecondition, "order %s is rejected", id)
		}
		return nil // the order was cancelled before: change nothing and send no event
	})
	if err != nil {
		return nil, err
	}
	return &ordersv1.CancelOrderResponse{Order: order}, nil
}

const listSQL = `
SELECT o.id, o.customer_id, o.status, o.reject_reason, o.placed_at, o.updated_at, line.skus, line.quantities
FROM orders o
CROSS JOIN LATERAL (
    SELECT array_agg(sku ORDER BY sku) AS skus, array_agg(quantity ORDER BY sku) AS quantities
    FROM order_lines WHERE order_id = o.id
) line
WHERE ($1::text IS NULL OR o.status = $1)
  AND ($2::text IS NULL OR o.customer_id = $2)
  AND ($3::timestamptz IS NULL OR (o.placed_at, o.id) < ($3, $4::uuid))
ORDER BY o.placed_at DESC, o.id DESC
LIMIT $5`

// ListOrders implements orders.v1.OrderService.
func (s *Service) ListOrders(
	ctx context.Context, req *ordersv1.ListOrdersRequest,
) (*ordersv1.ListOrdersResponse, error) {
	size := cmp.Or(int(req.GetPageSize()), s.config.PageSize)
	var status, customer *string
	if req.GetStatus() != ordersv1.OrderStatus_ORDER_STATUS_UNSPECIFIED {
		status = proto.String(statusText(req.GetStatus()))
	}
	if req.GetCustomerId() != "" {
		customer = proto.String(req.GetCustomerId())
	}
	after, afterID, err := parsePageToken(req.GetPageToken())
	if err != nil {
		return nil, err
	}
	// QueryExecModeCacheDescribe makes Postgres plan every call for its filters. A generic plan would scan all orders to
	// find those of one customer. The extra row (size+1) shows whether another page follows.
	rows, _ := s.db.Query(ctx, listSQL, pgx.QueryExecModeCacheDescribe, status, customer, after, afterID, size+1)
	orders, err := pgx.CollectRows(rows, scanOrder)
	if err != nil {
		return nil, postgres.Classify(fmt.Errorf("list orders: %w", err))
	}
	if len(orders) <= size {
		return &ordersv1.ListOrdersResponse{Orders: orders}, nil
	}
	return &ordersv1.ListOrdersResponse{Orders: orders[:size], NextPageToken: pageToken(orders[size-1])}, nil
}

// sortLines returns the lines sorted by SKU, so that equal orders compare equal, and the lines' columns for SQL.
func sortLines(lines []*ordersv1.Line) (sorted []*ordersv1.Line, skus []string, quantities []int32) {
	sorted = slices.SortedFunc(slices.Values(lines), func(a, b *ordersv1.Line) int {
		return strings.Compare(a.GetSku(), b.GetSku())
	})
	for _, line := range sorted {
		skus = append(skus, line.GetSku())
		quantities = append(quantities, line.GetQuantity())
	}
	return sorted, skus, quantities
}

// parseID returns the canonical form of an order ID. Message keys and responses contain only this form.
func parseID(text string) (string, error) {
	id, err := uuid.Parse(text)
	if err != nil {
		return "", connect.NewError(connect.CodeInvalidArgument, "order_id is not a UUID")
	}
	return id.String(), nil
}

// statusText returns a status as the column orders.status stores it: ORDER_STATUS_PLACED becomes "placed".
func statusText(status ordersv1.OrderStatus) string {
	return strings.ToLower(strings.TrimPrefix(status.String(), "ORDER_STATUS_"))
}

// parseStatus is the inverse of statusText.
func parseStatus(text string) ordersv1.OrderStatus {
	return ordersv1.OrderStatus(ordersv1.OrderStatus_value["ORDER_STATUS_"+strings.ToUpper(text)])
}

// pageToken encodes the position of the last order of a page: its time in microseconds, the resolution of Postgres, and
// its ID.
func pageToken(last *ordersv1.Order) string {
	id := uuid.MustParse(last.GetId())
	token := binary.BigEndian.AppendUint64(nil, uint64(last.GetPlacedAt().AsTime().UnixMicro()))
	return base64.RawURLEncoding.EncodeToString(append(token, id[:]...))
}

// parsePageToken decodes a token of pageToken. It returns nil, nil, nil for an empty token, which means the first page.
func parsePageToken(text string) (*time.Time, *uuid.UUID, error) {
	if text == "" {
		return nil, nil, nil
	}
	token, err := base64.RawURLEncoding.DecodeString(text)
	if err != nil || len(token) != 8+16 {
		return nil, nil, connect.NewError(connect.CodeInvalidArgument, "page_token is not one that ListOrders returned")
	}
	at := time.UnixMicro(int64(binary.BigEndian.Uint64(token)))
	if year := at.Year(); year < 1970 || year > 9999 {
		return nil, nil, connect.NewError(connect.CodeInvalidArgument, "page_token is not one that ListOrders returned")
	}
	id := uuid.UUID(token[8:])
	return &at, &id, nil
}
