package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"connectrpc.com/connect/v2"
	"connectrpc.com/connect/v2/connecthttp"
	"example.com/shop/internal/changes"
	ordersv1 "example.com/shop/internal/gen/orders/v1"
	"example.com/shop/internal/gen/orders/v1/ordersv1connect"
	"example.com/shop/internal/orders"
	"example.com/shop/internal/outbox"
	"example.com/shop/internal/postgres"
	"example.com/shop/internal/rpcserver"
	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"golang.org/x/sync/errgroup"
	"google.golang.org/protobuf/types/known/timestamppb"
)

const (
	placeWorkers  = 8
	placeDuration = 2 * time.Second
	placeWarmUp   = 500 * time.Millisecond
)

var placeRow = row{
	name:  "place",
	title: "PlaceOrder, price of the pattern",
	how: fmt.Sprintf("%d concurrent callers place orders of two lines, one after the other. With: the service's own "+
		"handler, doorbell included. Without: the same work and statement in the same kind of transaction, but no "+
		"message, "+
		"no insert and no doorbell. Over HTTP: through the service's server and a Connect client, in one process. "+
		"Handler: the method called directly.", placeWorkers),
	limit: "Processor time. Commits share their waits for the disk. The insert is sent with COMMIT; it adds one row " +
		"with three indexes to the orders' six.",
	shortTurns: 4,
	contestants: []contestant{
		{name: "http, without", run: place(true, false)},
		{name: "http, with", run: place(true, true)},
		{name: "handler, without", run: place(false, false)},
		{name: "handler, with", run: place(false, true)},
	},
	lines: []line{
		{label: "over HTTP, without the insert", contestant: "http, without", metric: rate, unit: "orders/s"},
		{label: "over HTTP, with the insert", contestant: "http, with", metric: rate, unit: "orders/s",
			against: "http, without", least: 0.85},
		{label: "handler, without the insert", contestant: "handler, without", metric: rate, unit: "orders/s"},
		{label: "handler, with the insert", contestant: "handler, with", metric: rate, unit: "orders/s",
			against: "handler, without", least: 0.85},
	},
}

// placeFunc places an order.
type placeFunc func(ctx context.Context, req *ordersv1.PlaceOrderRequest) (*ordersv1.PlaceOrderResponse, error)

func place(overHTTP, withOutbox bool) func(ctx context.Context, b *bench) (measured, error) {
	return func(ctx context.Context, b *bench) (found measured, err error) {
		err = b.withDatabase(ctx, nothing, migrated, func(url string) error {
			return withPool(ctx, postgres.Config{URL: url}, func(db *pgxpool.Pool) error {
				ctx, cancel := context.WithCancel(ctx)
				bell := outbox.NewNotifyBell(url)
				group := errgroup.Group{}
				group.Go(func() error { bell.Run(ctx); return nil })
				defer func() { cancel(); _ = group.Wait() }()
				writer := outbox.NewWriter(db, bell, nil)
				var service ordersv1connect.OrderServiceHandler = orders.NewService(db, writer,
					changes.New(changes.Config{}), orders.Config{})
				if !withOutbox {
					service = &bareService{service, db}
				}
				call := service.PlaceOrder
				if overHTTP {
					if call, err = serve(ctx, &group, service); err != nil {
						return err
					}
				}
				found, err = placeMany(ctx, call, placeDuration)
				return err
			})
		})
		return found, err
	}
}

// placeMany measures callers that place one order after the other. It does not count the warm-up: connections open, and
// each session parses and plans every statement a few times.
func placeMany(ctx context.Context, call placeFunc, duration time.Duration) (measured, error) {
	if _, err := placeFor(ctx, call, placeWarmUp); err != nil {
		return nil, err
	}
	began := time.Now()
	placed, err := placeFor(ctx, call, duration)
	return measured{rate: float64(placed) / time.Since(began).Seconds()}, err
}

func placeFor(ctx context.Context, call placeFunc, duration time.Duration) (int64, error) {
	var placed atomic.Int64
	began := time.Now()
	group, ctx := errgroup.WithContext(ctx)
	for range placeWorkers {
		group.Go(func() error {
			for time.Since(began) < duration {
				if _, err := call(ctx, newOrder()); err != nil {
					return err
				}
				placed.Add(1)
			}
			return nil
		})
	}
	err := group.Wait()
	return placed.Load(), err
}

// skus is the number of different products: enough that orders seldom wait for each other's stock.
const skus = 100

func newOrder() *ordersv1.PlaceOrderRequest {
	id := uuid.Must(uuid.NewV7())
	return &ordersv1.PlaceOrderRequest{
		OrderId: id.String(), CustomerId: fmt.Sprintf("customer-%d", id[15]),
		Lines: []*ordersv1.Line{
			{Sku: fmt.Sprintf("sku-%d", int(id[14])%skus), Quantity: 1},
			{Sku: fmt.Sprintf("sku-%d", (int(id[14])+1)%skus), Quantity: 2},
		},
	}
}

// serve serves the service until ctx is done, and returns a client's PlaceOrder.
func serve(
	ctx context.Context, group *errgroup.Group, service ordersv1connect.OrderServiceHandler,
) (placeFunc, error) {
	addr, err := freeAddress()
	if err != nil {
		return nil, err
	}
	server := rpcserver.New(rpcserver.Config{Addr: addr, Log: slog.Default()}, func(s *connect.Server) {
		ordersv1connect.RegisterOrderServiceHandler(s, service)
	})
	group.Go(func() error { return server.Run(ctx) })
	transport := &http.Transport{MaxIdleConnsPerHost: placeWorkers}
	client := ordersv1connect.NewOrderServiceClient(connect.NewClient(
		connecthttp.NewTransport(&http.Client{Transport: transport}, "http://"+addr)))
	context.AfterFunc(ctx, transport.CloseIdleConnections)
	place := func(ctx context.Context, req *ordersv1.PlaceOrderRequest) (*ordersv1.PlaceOrderResponse, error) {
		return client.PlaceOrder(ctx, req)
	}
	return place, untilDone(ctx, func() error {
		_, err := place(ctx, newOrder())
		return err
	})
}

// bareService does the work of the service without sending messages.
type bareService struct {
	ordersv1connect.OrderServiceHandler
	db *pgxpool.Pool
}

// barePlaceSQL is the statement of internal/orders.
const barePlaceSQL = `
WITH placed AS (
    INSERT INTO orders (id, customer_id) VALUES ($1, $2) ON CONFLICT (id) DO NOTHING RETURNING id, placed_at
), lines AS (
    INSERT INTO order_lines (order_id, sku, quantity)
    SELECT placed.id, line.sku, line.quantity FROM placed, unnest($3::text[], $4::int[]) AS line (sku, quantity)
)
SELECT placed_at FROM placed`

func (s *bareService) PlaceOrder(
	ctx context.Context, req *ordersv1.PlaceOrderRequest,
) (*ordersv1.PlaceOrderResponse, error) {
	id, err := uuid.Parse(req.GetOrderId())
	if err != nil {
		return nil, err
	}
	lines := slices.SortedFunc(slices.Values(req.GetLines()), func(a, b *ordersv1.Line) int {
		return strings.Compare(a.GetSku(), b.GetSku())
	})
	var names []string
	var quantities []int32
	for _, line := range lines {
		names, quantities = append(names, line.GetSku()), append(quantities, line.GetQuantity())
	}
	var placedAt time.Time
	err = postgres.Transact(ctx, s.db, func(tx pgx.Tx) error {
		return tx.QueryRow(ctx, barePlaceSQL, id.String(), req.GetCustomerId(), names, quantities).Scan(&placedAt)
	})
	if err != nil {
		return nil, errors.Join(errors.New("place order"), err)
	}
	at := timestamppb.New(placedAt)
	return &ordersv1.PlaceOrderResponse{Order: &ordersv1.Order{
		Id: id.String(), CustomerId: req.GetCustomerId(), Lines: lines,
		Status: ordersv1.OrderStatus_ORDER_STATUS_PLACED, PlacedAt: at, UpdatedAt: at,
	}}, nil
}
