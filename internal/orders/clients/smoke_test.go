package clients

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect/v2/connecthttp"
	"example.com/shop/internal/dev/testenv"
	ordersv1 "example.com/shop/internal/gen/orders/v1"
	"example.com/shop/internal/gen/orders/v1/ordersv1connect"
	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/google/uuid"
	"google.golang.org/protobuf/proto"
)

// call is one call of orders.v1.OrderService, for any client to make.
type call struct {
	method  string
	request proto.Message
	stream  bool
	timeout time.Duration
	// heard is called when the first message of a stream has arrived.
	heard func()
}

// outcome is the result of a call as the client saw it.
type outcome struct {
	Code       string
	Statuses   []string // of the orders in the messages, without ORDER_STATUS_
	Violations []string // the fields that an error's details name
}

// client is one kind of client and its way to make a call.
type client struct {
	name string
	call func(t *testing.T, addr string, c call) outcome
}

var clients = []client{
	{"grpc-go", callGRPC},
	{"connect-go", callConnect()},
	{"connect-go, gRPC", callConnect(connecthttp.WithGRPC())},
	{"connect-go, gRPC-Web", callConnect(connecthttp.WithGRPCWeb())},
	{"curl", callCurl},
	{"buf curl", callBuf("connect")},
	{"buf curl, gRPC", callBuf("grpc")},
	{"buf curl, gRPC-Web", callBuf("grpcweb")},
	{"connect-web", callNode("connect")},
	{"connect-web, gRPC-Web", callNode("grpc-web")},
}

// Every client gets the same responses from the same port.
func TestSmoke(t *testing.T) {
	t.Parallel()
	if err := install(); err != nil {
		t.Fatal(err)
	}
	addr := serve(t)
	own := newClient(t, addr)
	if _, err := own.SetStock(t.Context(), &ordersv1.SetStockRequest{Sku: "apple", Total: 100}); err != nil {
		t.Fatal(err)
	}
	confirmed := func(t *testing.T) string {
		id := place(t, own, "apple")
		awaitStatus(t, own, id, ordersv1.OrderStatus_ORDER_STATUS_CONFIRMED)
		return id
	}
	for _, row := range []struct {
		name string
		call func(t *testing.T) call
		want outcome
	}{
		{"an answer", func(t *testing.T) call {
			return call{method: "GetOrder", request: &ordersv1.GetOrderRequest{OrderId: confirmed(t)}}
		}, outcome{Code: "ok", Statuses: []string{"CONFIRMED"}}},

		{"an error with details", func(*testing.T) call {
			return call{method: "PlaceOrder", request: &ordersv1.PlaceOrderRequest{
				OrderId: "1", CustomerId: "ann", Lines: []*ordersv1.Line{{Sku: "apple", Quantity: 1}, {Sku: "pear"}},
			}}
		}, outcome{Code: "invalid_argument", Violations: []string{"order_id", "lines[1].quantity"}}},

		{"not found", func(*testing.T) call {
			return call{method: "GetOrder", request: &ordersv1.GetOrderRequest{OrderId: uuid.NewString()}}
		}, outcome{Code: "not_found"}},

		{"a stream", func(t *testing.T) call {
			id := confirmed(t)
			return call{method: "WatchOrder", stream: true, request: &ordersv1.WatchOrderRequest{OrderId: id},
				heard: func() {
					if _, err := own.CancelOrder(t.Context(), &ordersv1.CancelOrderRequest{OrderId: id}); err != nil {
						t.Error(err)
					}
				}}
		}, outcome{Code: "ok", Statuses: []string{"CONFIRMED", "CANCELLED"}}},

		{"a deadline", func(t *testing.T) call {
			return call{
				method: "WatchOrder", stream: true, timeout: 2 * time.Second,
				request: &ordersv1.WatchOrderRequest{OrderId: confirmed(t)},
			}
		}, outcome{Code: "deadline_exceeded"}},

		{"a request that is too large", func(*testing.T) call {
			return call{method: "SetStock", request: &ordersv1.SetStockRequest{Sku: strings.Repeat("x", 5<<20)}}
		}, outcome{Code: "resource_exhausted"}},
	} {
		for _, client := range clients {
			t.Run(row.name+"/"+client.name, func(t *testing.T) {
				got := client.call(t, addr, row.call(t))
				if got.Code == "deadline_exceeded" {
					got.Statuses = nil // a slow machine may receive no message before the deadline
				}
				if diff := cmp.Diff(row.want, got, cmpopts.EquateEmpty()); diff != "" {
					t.Errorf("-want +got:\n%s", diff)
				}
			})
		}
	}
}

func awaitStatus(t *testing.T, client ordersv1connect.OrderServiceClient, id string, want ordersv1.OrderStatus) {
	t.Helper()
	testenv.Eventually(t, 30*time.Second, func() error {
		res, err := client.GetOrder(t.Context(), &ordersv1.GetOrderRequest{OrderId: id})
		if err == nil && res.GetOrder().GetStatus() != want {
			err = fmt.Errorf("order is %s", res.GetOrder().GetStatus())
		}
		return err
	})
}
