package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"connectrpc.com/connect/v2"
	"connectrpc.com/connect/v2/connecthttp"
	"connectrpc.com/connect/v2/connectinprocess"
	ordersv1 "example.com/shop/internal/gen/orders/v1"
	"example.com/shop/internal/gen/orders/v1/ordersv1connect"
	"example.com/shop/internal/rabbitrpc"
	"golang.org/x/sync/errgroup"
)

const rpcDuration = 2 * time.Second

var rpcRow = row{
	name:  "rpc",
	title: "RPC",
	how: "One call of the same generated client to the same handler, which answers from memory, by 1 caller and by 64, each with one call after the other: in process, over HTTP/2 " +
		"without TLS, and over RabbitMQ with one replica. Client and server are in the benchmark's process, the broker is not.",
	limit: "Processor time. Over the queue a call passes the broker twice, and a single caller waits for that; many share its writes.",
	contestants: []contestant{
		{name: "in process 1", run: rpc(inProcess, 1)}, {name: "HTTP/2 1", run: rpc(overHTTP2, 1)}, {name: "queue 1", run: rpc(overQueue, 1)},
		{name: "in process 64", run: rpc(inProcess, 64)}, {name: "HTTP/2 64", run: rpc(overHTTP2, 64)}, {name: "queue 64", run: rpc(overQueue, 64)},
	},
	lines: slices.Concat(
		rpcLines("in process", 1, "", 0), rpcLines("HTTP/2", 1, "", 0), rpcLines("queue", 1, "HTTP/2", 0),
		rpcLines("in process", 64, "", 0), rpcLines("HTTP/2", 64, "", 0), rpcLines("queue", 64, "HTTP/2", 0.5),
	),
}

func rpcLines(way string, callers int, against string, least float64) []line {
	name := func(way string) string {
		if way == "" {
			return ""
		}
		return fmt.Sprintf("%s %d", way, callers)
	}
	label := fmt.Sprintf("%s, callers: %d", way, callers)
	return []line{
		{label: label, contestant: name(way), metric: rate, unit: "calls/s", against: name(against), least: least},
		{label: label + ", p50", contestant: name(way), metric: "p50", unit: "ms"},
		{label: label + ", p99", contestant: name(way), metric: "p99", unit: "ms"},
	}
}

// fromMemory answers without doing anything.
type fromMemory struct {
	ordersv1connect.OrderServiceHandler
}

func (fromMemory) GetStock(_ context.Context, req *ordersv1.GetStockRequest) (*ordersv1.GetStockResponse, error) {
	return &ordersv1.GetStockResponse{Stock: &ordersv1.Stock{Sku: req.GetSku(), Total: 1, Free: 1}}, nil
}

// A way calls fn with a client that reaches server.
type way func(ctx context.Context, b *bench, server *connect.Server, fn func(client *connect.Client) error) error

func rpc(way way, callers int) func(ctx context.Context, b *bench) (measured, error) {
	return func(ctx context.Context, b *bench) (found measured, err error) {
		server := connect.NewServer()
		ordersv1connect.RegisterOrderServiceHandler(server, fromMemory{})
		err = way(ctx, b, server, func(client *connect.Client) error {
			service := ordersv1connect.NewOrderServiceClient(client)
			found, err = callInTurns(ctx, callers, 0, func(ctx context.Context) error {
				_, err := service.GetStock(ctx, &ordersv1.GetStockRequest{Sku: "apple"})
				return err
			})
			return err
		})
		return found, err
	}
}

// callInTurns measures callers that make one call after the other, with a pause in between. The first half second is not counted.
func callInTurns(ctx context.Context, callers int, pause time.Duration, call func(ctx context.Context) error) (measured, error) {
	const during, after = 1, 2
	var phase atomic.Int32
	var mu sync.Mutex
	var all []time.Duration
	group, ctx := errgroup.WithContext(ctx)
	for range callers {
		group.Go(func() error {
			var took []time.Duration
			for now := phase.Load(); now != after && ctx.Err() == nil; now = phase.Load() {
				began := time.Now()
				if err := call(ctx); err != nil {
					return err
				}
				if now == during {
					took = append(took, time.Since(began))
				}
				time.Sleep(pause)
			}
			mu.Lock()
			defer mu.Unlock()
			all = append(all, took...)
			return nil
		})
	}
	group.Go(func() error {
		time.Sleep(500 * time.Millisecond)
		phase.Store(during)
		time.Sleep(rpcDuration)
		phase.Store(after)
		return nil
	})
	err := group.Wait()
	return measured{rate: float64(len(all)) / rpcDuration.Seconds(), "p50": milliseconds(all, 50), "p99": milliseconds(all, 99)}, err
}

func inProcess(_ context.Context, _ *bench, server *connect.Server, fn func(client *connect.Client) error) error {
	return fn(connect.NewClient(connectinprocess.New(server)))
}

func overHTTP2(ctx context.Context, _ *bench, server *connect.Server, fn func(client *connect.Client) error) error {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	mux, protocols := http.NewServeMux(), new(http.Protocols)
	connecthttp.Mount(mux, server)
	protocols.SetUnencryptedHTTP2(true)
	web := &http.Server{Handler: mux, Protocols: protocols}
	go web.Serve(listener)
	transport := &http.Transport{Protocols: protocols}
	err = fn(connect.NewClient(connecthttp.NewTransport(&http.Client{Transport: transport}, "http://"+listener.Addr().String())))
	transport.CloseIdleConnections()
	return errors.Join(err, web.Shutdown(ctx))
}

func overQueue(ctx context.Context, b *bench, server *connect.Server, fn func(client *connect.Client) error) error {
	ctx, cancel := context.WithCancel(ctx)
	var replica errgroup.Group
	replica.Go(func() error { return rabbitrpc.NewServer(rabbitrpc.ServerConfig{URL: b.AMQPURL}, server).Run(ctx) })
	transport := rabbitrpc.NewTransport(rabbitrpc.TransportConfig{URL: b.AMQPURL})
	client := connect.NewClient(transport)
	err := untilDone(ctx, func() error { // until the replica has its queue
		_, err := ordersv1connect.NewOrderServiceClient(client).GetStock(ctx, &ordersv1.GetStockRequest{Sku: "apple"})
		return err
	})
	if err == nil {
		err = fn(client)
	}
	transport.Close()
	cancel()
	return errors.Join(err, replica.Wait())
}
