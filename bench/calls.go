package main

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"time"

	"connectrpc.com/connect/v2"
	"connectrpc.com/connect/v2/connecthttp"
	"example.com/shop/internal/gen/orders/v1/ordersv1connect"
	operationsv1 "example.com/shop/internal/gen/shop/operations/v1"
	"example.com/shop/internal/gen/shop/operations/v1/operationsv1connect"
	"example.com/shop/internal/rabbit"
)

var callsRow = row{
	name:  "calls",
	title: "Durable calls",
	how: fmt.Sprintf("Processes of the binary, called over HTTP. PlaceOrder and its submission (Prefer: "+
		"respond-async): "+
		"%d callers make one call after the other, and only the API process runs. Submit → result: all three processes "+
		"run, otherwise idle; one caller submits a call, waits for its result, and repeats after 50 ms.", placeWorkers),
	limit: "Submission: one commit, as in PlaceOrder. Result: five consecutive trips to the disk (submission, claim, " +
		"queue, effect with result) and the doorbell on the way back.",
	contestants: []contestant{
		{name: "place", run: calls([]string{"api"}, placeWorkers, 0, (*caller).place)},
		{name: "submit", run: calls([]string{"api"}, placeWorkers, 0, (*caller).submitOnly)},
		{name: "result", run: calls([]string{"api", "relay", "consumer"}, 1, 50*time.Millisecond,
			(*caller).submitAndWait)},
	},
	lines: []line{
		{label: "PlaceOrder", contestant: "place", metric: rate, unit: "calls/s"},
		{label: "submit PlaceOrder", contestant: "submit", metric: rate, unit: "calls/s", against: "place",
			least: 0.85},
		{label: "submit → result, idle, p50", contestant: "result", metric: "p50", unit: "ms", most: 15},
		{label: "submit → result, idle, p99", contestant: "result", metric: "p99", unit: "ms"},
	},
}

type caller struct {
	orders     ordersv1connect.OrderServiceClient
	operations operationsv1connect.OperationServiceClient
}

func (c *caller) place(ctx context.Context) error {
	_, err := c.orders.PlaceOrder(ctx, newOrder())
	return err
}

func (c *caller) submitOnly(ctx context.Context) error {
	_, err := c.submit(ctx)
	return err
}

func (c *caller) submit(ctx context.Context) (name string, err error) {
	ctx, info := connect.NewClientContext(ctx)
	info.RequestHeader().Set("prefer", "respond-async")
	_, err = c.orders.PlaceOrder(ctx, newOrder())
	return info.ResponseHeader().Get("operation"), err
}

func (c *caller) submitAndWait(ctx context.Context) error {
	name, err := c.submit(ctx)
	if err != nil {
		return err
	}
	answer, err := c.operations.WaitOperation(ctx, &operationsv1.WaitOperationRequest{Name: name})
	if err == nil && answer.GetOperation().GetState() != operationsv1.OperationState_OPERATION_STATE_SUCCEEDED {
		err = fmt.Errorf("operation ended as %v", answer.GetOperation())
	}
	return err
}

// calls measures callers of the service's processes.
func calls(
	processes []string, callers int, pause time.Duration, call func(c *caller, ctx context.Context) error,
) func(ctx context.Context, b *bench) (measured, error) {
	return func(ctx context.Context, b *bench) (found measured, err error) {
		err = b.withDatabase(ctx, nothing, migrated, func(url string) error {
			defer b.deleteQueues(serviceTopology)
			addr, err := freeAddress()
			if err != nil {
				return err
			}
			return b.withService(url, addr, processes, nil, func([]int) error {
				transport := &http.Transport{MaxIdleConnsPerHost: placeWorkers}
				defer transport.CloseIdleConnections()
				client := connect.NewClient(connecthttp.NewTransport(&http.Client{Transport: transport}, "http://"+
					addr))
				c := &caller{
					orders:     ordersv1connect.NewOrderServiceClient(client),
					operations: operationsv1connect.NewOperationServiceClient(client),
				}
				if err := untilDone(ctx, func() error { return call(c, ctx) }); err != nil {
					return err
				}
				found, err = callInTurns(ctx, callers, pause, func(ctx context.Context) error { return call(c, ctx) })
				return err
			})
		})
		return found, err
	}
}

// serviceTopology names the exchange and the queues that the service's processes declare.
var serviceTopology = rabbit.Topology{Exchange: exchange, Queues: []rabbit.Queue{
	{Name: "shop.fulfillment"}, {Name: "shop.notifications"}, {Name: "shop.operations"},
}}

func freeAddress() (string, error) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	defer listener.Close()
	return listener.Addr().String(), nil
}

// untilDone retries until try succeeds, or for as long as a service may take to start.
func untilDone(ctx context.Context, try func() error) error {
	for began := time.Now(); ; time.Sleep(20 * time.Millisecond) {
		err := try()
		if err == nil || time.Since(began) > 15*time.Second || ctx.Err() != nil {
			return err
		}
	}
}
