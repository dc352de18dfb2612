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
	how: "The same generated client calls the same handler, which answers from memory: in process, over HTTP/2 without " +
		"TLS, and over RabbitMQ with one replica. There are 1 or 64 callers, each with one call after the other. " +
		"Client " +
		"and server are in the benchmark's process, the broker is not.",
	limit: "Processor time. Over the queue a call passes the broker twice. A single caller waits for that; many " +
		"callers " +
		"share the broker's writes.",
	contestants: []contestant{
		{name: "in process 1", run: rpc(inProcess, 1)},
		{name: "HTTP/2 1", run: rpc(overHTTP2, 1)},
		{name: "queue 1", run: rpc(overQueue, 1)},
		{name: "in process 64", run: rpc(inProcess, 64)},
		{name: "HTTP/2 64", run: rpc(overHTTP2, 64)},
		{name: "queue 64", run: rpc(overQueue, 64)},
	},
	lines: slices.Concat(
		rpcLines("in process", 1, "", 0), rpcLines("HTTP/2", 1, "", 0), rpcLines("queue", 1, "HTTP/2", 0),
		rpcLines("in process", 64, "", 0), rpcLines("HTTP/2", 64, "", 0), rpcLines("queue", 64, "HTTP/2", 0.5),
	),
}

func rpcLines(transport string, callers int, against string, least float64) []line {
	name := func(transport string) string {
		if transport == "" {
			return ""
		}
		return fmt.Sprintf("%s %d", transport, callers)
	}
	label := fmt.Sprintf("%s, callers: %d", transport, callers)
	return []line{
		{label: label, contestant: name(transport), metric: rate, unit: "calls/s", against: name(against),
			least: least},
		{label: label + ", p50", contestant: name(transport), metric: "p50", unit: "ms"},
		{label: label + ", p99", contestant: name(transport), metric: "p99", unit: "ms"},
	}
}

// fromMemory is a service that answers from memory.
type fromMemory struct {
	ordersv1connect.OrderServiceHandler
}

func (fromMemory) GetStock(_ context.Context, req *ordersv1.GetStockRequest) (*ordersv1.GetStockResponse, error) {
	return &ordersv1.GetStockResponse{Stock: &ordersv1.Stock{Sku: req.GetSku(), Total: 1, Free: 1}}, nil
}

// withClient calls fn with a client that reaches server.
type withClient func(ctx context.Context, b *bench, server *connect.Server, fn func(client *connect.Client) error) error

func rpc(with withClient, callers int) func(ctx context.Context, b *bench) (measured, error) {
	return func(ctx context.Context, b *bench) (found measured, err error) {
		server := connect.NewServer()
		ordersv1connect.RegisterOrderServiceHandler(server, fromMemory{})
		err = with(ctx, b, server, func(client *connect.Client) error {
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

// callInTurns measures callers that make one call after the other with a pause in between. It does not count the first
// half second.
func callInTurns(
	ctx context.Context, callers int, pause time.Duration, call func(ctx context.Context) error,
) (measured, error) {
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
	return measured{
		rate: float64(len(all)) / rpcDuration.Seconds(), "p50": milliseconds(all, 50), "p99": milliseconds(all, 99),
	}, err
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
	url := "http://" + listener.Addr().String()
	err = fn(connect.NewClient(connecthttp.NewTransport(&http.Client{Transport: transport}, url)))
	transport.CloseIdleConnections()
	return errors.Join(err, web.Shutdown(ctx))
}

func overQueue(ctx context.Context, b *bench, server *connect.Server, fn func(client *connect.Client) error) error {
	ctx, cancel := context.WithCancel(ctx)
	var replica errgroup.Group
	replica.Go(func() error {
		return rabbitrpc.NewServer(rabbitrpc.ServerConfig{URL: b.AMQPURL}, server).Run(ctx)
	})
	transport := rabbitrpc.NewTransport(rabbitrpc.TransportConfig{URL: b.AMQPURL})
	client := connect.NewClient(transport)
	service := ordersv1connect.NewOrderServiceClient(client)
	err := untilDone(ctx, func() error { // until the replica has its queue
		_, err := service.GetStock(ctx, &ordersv1.GetStockRequest{Sku: "apple"})
		return err
	})
	if err == nil {
		err = fn(client)
	}
	transport.Close()
	cancel()
	return errors.Join(err, replica.Wait())
}
