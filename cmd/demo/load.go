//go:build unix

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"connectrpc.com/connect/v2"
	"connectrpc.com/connect/v2/connecthttp"
	ordersv1 "example.com/shop/internal/gen/orders/v1"
	"example.com/shop/internal/gen/orders/v1/ordersv1connect"
	"golang.org/x/sync/errgroup"
)

const (
	// workers is the number of orders that are placed concurrently.
	workers = 16
	// callTimeout bounds a call before it is retried.
	callTimeout = 5 * time.Second
	// orderPatience bounds the retries of an order. Then the run fails.
	orderPatience = 30 * time.Second
)

// protocol is a client of the API over one of its protocols.
type protocol struct {
	name   string
	client ordersv1connect.OrderServiceClient
	http   *http.Client
	placed atomic.Int64
}

// load places the planned orders.
type load struct {
	plan      plan
	rate      int
	protocols []*protocol

	placed   atomic.Int64 // orders acknowledged
	calls    atomic.Int64 // of PlaceOrder
	repeated atomic.Int64 // retried calls

	mu    sync.Mutex
	acked []string // IDs of acknowledged orders
}

func newLoad(url, apiKey string, plan plan, rate int) *load {
	return &load{plan: plan, rate: rate, protocols: []*protocol{
		newProtocol("Connect", url, apiKey, false),
		newProtocol("gRPC", url, apiKey, true, connecthttp.WithGRPC()),
		newProtocol("gRPC-Web", url, apiKey, false, connecthttp.WithGRPCWeb()),
	}}
}

func newProtocol(name, url, apiKey string, http2 bool, options ...connecthttp.Option) *protocol {
	protocols := new(http.Protocols)
	protocols.SetHTTP1(!http2)
	protocols.SetUnencryptedHTTP2(http2)
	client := &http.Client{Transport: &http.Transport{Protocols: protocols, MaxIdleConnsPerHost: 3 * workers}}
	transport := connecthttp.NewTransport(client, url, options...)
	orders := ordersv1connect.NewOrderServiceClient(connect.NewClient(transport, withKey(apiKey)))
	return &protocol{name: name, http: client, client: orders}
}

// withKey sends the API key, if there is one, with each call.
func withKey(apiKey string) connect.ClientInterceptor {
	return func(next connect.ClientFunc) connect.ClientFunc {
		return func(ctx context.Context, spec connect.Spec) (connect.ClientStream, error) {
			if info, ok := connect.CallInfoForClientContext(ctx); ok && apiKey != "" {
				info.RequestHeader().Set("x-api-key", apiKey)
			}
			return next(ctx, spec)
		}
	}
}

func (l *load) close() {
	for _, p := range l.protocols {
		p.http.CloseIdleConnections()
	}
}

// progress returns the share of orders that are placed.
func (l *load) progress() float64 { return float64(l.placed.Load()) / float64(len(l.plan.orders)) }

func (l *load) stockUp(ctx context.Context) error {
	for sku, total := range l.plan.stock {
		_, err := l.protocols[0].client.SetStock(ctx, &ordersv1.SetStockRequest{Sku: sku, Total: int32(total)})
		if err != nil {
			return fmt.Errorf("set stock: %w", err)
		}
	}
	return nil
}

// run places all orders at the rate or slower, a third of them over each protocol.
func (l *load) run(ctx context.Context) error {
	group, ctx := errgroup.WithContext(ctx)
	due := make(chan int)
	group.Go(func() error {
		defer close(due)
		pace := time.NewTicker(time.Second / time.Duration(l.rate))
		defer pace.Stop()
		for i := range l.plan.orders {
			select {
			case <-pace.C:
			case <-ctx.Done():
				return ctx.Err()
			}
			select {
			case due <- i:
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		return nil
	})
	for range workers {
		group.Go(func() error {
			for i := range due {
				if err := l.place(ctx, i); err != nil {
					return err
				}
				if l.plan.orders[i].cancel {
					group.Go(func() error { return l.cancel(ctx, i) })
				}
			}
			return nil
		})
	}
	return group.Wait()
}

// place makes all planned calls for an order until it is acknowledged.
func (l *load) place(ctx context.Context, i int) error {
	ctx, cancel := context.WithTimeout(ctx, orderPatience)
	defer cancel()
	order := &l.plan.orders[i]
	group, calling := errgroup.WithContext(ctx)
	for n := range order.calls {
		// Concurrent calls for an order use different protocols, as different callers would.
		over := l.protocols[(i+n)%len(l.protocols)]
		group.Go(func() error { return l.call(calling, over, order) })
	}
	if err := group.Wait(); err != nil {
		return fmt.Errorf("place order %s: %w", order.id, err)
	}
	own := l.protocols[i%len(l.protocols)]
	own.placed.Add(1)
	l.placed.Add(1)
	l.mu.Lock()
	l.acked = append(l.acked, order.id)
	l.mu.Unlock()
	return nil
}

// cancel waits for the planned time and cancels the order.
func (l *load) cancel(ctx context.Context, i int) error {
	ctx, stop := context.WithTimeout(ctx, orderPatience)
	defer stop()
	order := &l.plan.orders[i]
	select {
	case <-time.After(order.cancelIn):
	case <-ctx.Done():
		return ctx.Err()
	}
	return l.retry(ctx, false, func(ctx context.Context) error {
		_, err := l.protocols[i%len(l.protocols)].client.CancelOrder(ctx,
			&ordersv1.CancelOrderRequest{OrderId: order.id})
		if err != nil && connect.CodeOf(err) == connect.CodeFailedPrecondition {
			return nil // already rejected
		}
		return err
	})
}

func (l *load) call(ctx context.Context, over *protocol, order *plannedOrder) error {
	return l.retry(ctx, order.impatient, func(ctx context.Context) error {
		l.calls.Add(1)
		answer, err := over.client.PlaceOrder(ctx, &ordersv1.PlaceOrderRequest{
			OrderId: order.id, CustomerId: order.customer, Lines: order.lines,
		})
		if err == nil && answer.GetOrder().GetId() != order.id {
			return fmt.Errorf("the answer contains order %s", answer.GetOrder().GetId())
		}
		return err
	})
}

// retry calls until there is an answer. It repeats the same call after an error that leaves the outcome open. That is
// safe because the caller chose the order's ID.
func (l *load) retry(ctx context.Context, impatient bool, call func(context.Context) error) error {
	patience := callTimeout
	if impatient {
		patience = time.Duration(rand.IntN(int(8 * time.Millisecond)))
	}
	for pause := 20 * time.Millisecond; ; pause = min(2*pause, time.Second) {
		limited, cancel := context.WithTimeout(ctx, patience)
		err := call(limited)
		cancel()
		if err == nil || ctx.Err() != nil || !unknown(err) {
			return err
		}
		l.repeated.Add(1)
		patience = callTimeout
		select {
		case <-ctx.Done():
			return err
		case <-time.After(pause/2 + rand.N(pause)):
		}
	}
}

// unknown reports whether the call may have succeeded despite the error, or may succeed on a retry.
func unknown(err error) bool {
	switch connect.CodeOf(err) {
	case connect.CodeUnavailable, connect.CodeDeadlineExceeded, connect.CodeCanceled, connect.CodeAborted,
		connect.CodeResourceExhausted:
		return true
	}
	// Connect reports CodeInternal if the server dies in the middle of its answer.
	return errors.Is(err, io.ErrUnexpectedEOF)
}

// traffic counts the calls of the load.
type traffic struct {
	calls, repeated int64
	byProtocol      string
}

func (l *load) summary() traffic {
	var over string
	for i, p := range l.protocols {
		if i > 0 {
			over += ", "
		}
		over += fmt.Sprintf("%s %s", grouped(int(p.placed.Load())), p.name)
	}
	return traffic{calls: l.calls.Load(), repeated: l.repeated.Load(), byProtocol: over}
}
