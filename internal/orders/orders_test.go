package orders_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"testing"

	"buf.build/gen/go/bufbuild/protovalidate/protocolbuffers/go/buf/validate"
	"buf.build/go/protovalidate"
	"connectrpc.com/connect/v2"
	"connectrpc.com/connect/v2/connectproto"
	"example.com/shop/internal/changes"
	ordersv1 "example.com/shop/internal/gen/orders/v1"
	"example.com/shop/internal/gen/orders/v1/ordersv1connect"
	"example.com/shop/internal/orders"
	"github.com/google/go-cmp/cmp"
	"github.com/google/uuid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	reflectionv1 "google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"
)

const (
	placed    = ordersv1.OrderStatus_ORDER_STATUS_PLACED
	confirmed = ordersv1.OrderStatus_ORDER_STATUS_CONFIRMED
	rejected  = ordersv1.OrderStatus_ORDER_STATUS_REJECTED
	cancelled = ordersv1.OrderStatus_ORDER_STATUS_CANCELLED
)

func TestInvalidRequestsNameTheField(t *testing.T) {
	t.Parallel()
	b := setup(t)
	id := uuid.NewString()
	place := func(change func(*ordersv1.PlaceOrderRequest)) func(context.Context) error {
		req := order(1, "apple", "pear")
		change(req)
		return func(ctx context.Context) error { _, err := b.PlaceOrder(ctx, req); return err }
	}
	list := func(req *ordersv1.ListOrdersRequest) func(context.Context) error {
		return func(ctx context.Context) error { _, err := b.ListOrders(ctx, req); return err }
	}
	setStock := func(sku string, total int32) func(context.Context) error {
		return func(ctx context.Context) error {
			_, err := b.SetStock(ctx, &ordersv1.SetStockRequest{Sku: sku, Total: total})
			return err
		}
	}
	type placeRequest = ordersv1.PlaceOrderRequest
	tests := map[string]struct {
		call  func(context.Context) error
		field string
	}{
		"place: no id":            {place(func(r *placeRequest) { r.OrderId = "" }), "order_id"},
		"place: id is not a uuid": {place(func(r *placeRequest) { r.OrderId = id + "0" }), "order_id"},
		"place: no customer":      {place(func(r *placeRequest) { r.CustomerId = "" }), "customer_id"},
		"place: NUL in customer":  {place(func(r *placeRequest) { r.CustomerId = "a\x00b" }), "customer_id"},
		"place: newline at end":   {place(func(r *placeRequest) { r.CustomerId = "a\n" }), "customer_id"},
		"place: long customer": {place(func(r *placeRequest) { r.CustomerId = strings.Repeat("a", 65) }),
			"customer_id"},
		"place: no lines": {place(func(r *placeRequest) { r.Lines = nil }), "lines"},
		"place: 101 lines": {place(func(r *placeRequest) { r.Lines = order(1, numbered(101)...).Lines }),
			"lines"},
		"place: sku twice":        {place(func(r *placeRequest) { r.Lines[1].Sku = r.Lines[0].Sku }), "lines"},
		"place: no sku":           {place(func(r *placeRequest) { r.Lines[1].Sku = "" }), "lines[1].sku"},
		"place: quantity is zero": {place(func(r *placeRequest) { r.Lines[1].Quantity = 0 }), "lines[1].quantity"},
		"place: huge quantity": {place(func(r *placeRequest) { r.Lines[0].Quantity = 1_000_001 }),
			"lines[0].quantity"},
		"list: negative page":      {list(&ordersv1.ListOrdersRequest{PageSize: -1}), "page_size"},
		"list: page of 1001":       {list(&ordersv1.ListOrdersRequest{PageSize: 1001}), "page_size"},
		"list: unknown status":     {list(&ordersv1.ListOrdersRequest{Status: 99}), "status"},
		"list: malformed customer": {list(&ordersv1.ListOrdersRequest{CustomerId: "' OR 1=1"}), "customer_id"},
		"set stock: no sku":        {setStock("", 1), "sku"},
		"set stock: negative":      {setStock("apple", -1), "total"},
		"set stock: too much":      {setStock("apple", 1_000_000_001), "total"},
		"get": {func(ctx context.Context) error {
			_, err := b.GetOrder(ctx, &ordersv1.GetOrderRequest{OrderId: "1"})
			return err
		}, "order_id"},
		"cancel": {func(ctx context.Context) error {
			_, err := b.CancelOrder(ctx, &ordersv1.CancelOrderRequest{OrderId: "1"})
			return err
		}, "order_id"},
		"get stock": {func(ctx context.Context) error {
			_, err := b.GetStock(ctx, &ordersv1.GetStockRequest{Sku: "a b"})
			return err
		}, "sku"},
		"watch": {func(ctx context.Context) error {
			stream, err := b.WatchOrder(ctx, &ordersv1.WatchOrderRequest{OrderId: "1"})
			if err != nil {
				return err
			}
			defer stream.Close()
			_, err = stream.Receive()
			return err
		}, "order_id"},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			err := test.call(t.Context())
			wantCode(t, err, connect.CodeInvalidArgument, "")
			if fields := violatedFields(t, err); !slices.Contains(fields, test.field) {
				t.Errorf("violations name %q, want %s", fields, test.field)
			}
		})
	}
	if n := b.count(t, `SELECT count(*) FROM orders`); n != 0 {
		t.Errorf("%d orders were placed", n)
	}
}

func violatedFields(t *testing.T, err error) (fields []string) {
	t.Helper()
	var invalid *connect.Error
	if !errors.As(err, &invalid) {
		t.Fatalf("got %v", err)
	}
	for _, detail := range invalid.Details() {
		message, err := connectproto.UnmarshalErrorDetail(detail)
		if err != nil {
			t.Fatal(err)
		}
		for _, violation := range message.(*validate.Violations).GetViolations() {
			fields = append(fields, protovalidate.FieldPathString(violation.GetField()))
		}
	}
	return fields
}

func numbered(n int) (skus []string) {
	for i := range n {
		skus = append(skus, fmt.Sprintf("sku-%03d", i))
	}
	return skus
}

func TestPlaceOrderReturnsWhatGetOrderReturns(t *testing.T) {
	t.Parallel()
	b := setup(t)
	req := order(3, numbered(100)...)
	slices.Reverse(req.Lines)
	first, err := b.PlaceOrder(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	stored, err := b.GetOrder(t.Context(), &ordersv1.GetOrderRequest{OrderId: req.OrderId})
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(first.GetOrder(), stored.GetOrder(), protocmp.Transform()); diff != "" {
		t.Errorf("placed and stored differ: %s", diff)
	}
	got := stored.GetOrder()
	if got.GetStatus() != placed || len(got.GetLines()) != 100 || got.GetLines()[0].GetSku() != "sku-000" {
		t.Errorf("got %v", got)
	}
}

func TestPlaceOrderAgain(t *testing.T) {
	t.Parallel()
	b := setup(t)
	req := order(1, "apple", "pear")
	if _, err := b.PlaceOrder(t.Context(), req); err != nil {
		t.Fatal(err)
	}
	change := func(fn func(*ordersv1.PlaceOrderRequest)) *ordersv1.PlaceOrderRequest {
		other := proto.CloneOf(req)
		fn(other)
		return other
	}
	for name, same := range map[string]*ordersv1.PlaceOrderRequest{
		"identical":            req,
		"lines in other order": change(func(r *ordersv1.PlaceOrderRequest) { slices.Reverse(r.Lines) }),
		"id in upper case":     change(func(r *ordersv1.PlaceOrderRequest) { r.OrderId = strings.ToUpper(r.OrderId) }),
	} {
		if res, err := b.PlaceOrder(t.Context(), same); err != nil || res.GetOrder().GetId() != req.OrderId {
			t.Errorf("%s: got %v, %v", name, res, err)
		}
	}
	for name, other := range map[string]*ordersv1.PlaceOrderRequest{
		"customer":    change(func(r *ordersv1.PlaceOrderRequest) { r.CustomerId = "customer-2" }),
		"sku":         change(func(r *ordersv1.PlaceOrderRequest) { r.Lines[0].Sku = "plum" }),
		"quantity":    change(func(r *ordersv1.PlaceOrderRequest) { r.Lines[0].Quantity++ }),
		"fewer lines": change(func(r *ordersv1.PlaceOrderRequest) { r.Lines = r.Lines[:1] }),
	} {
		_, err := b.PlaceOrder(t.Context(), other)
		if connect.CodeOf(err) != connect.CodeAlreadyExists {
			t.Errorf("different %s: got %v", name, err)
		}
	}
	if n := len(b.messages(t)); n != 1 {
		t.Errorf("outbox has %d messages, want 1", n)
	}
	b.cancel(t, req.OrderId)
	if res, err := b.PlaceOrder(t.Context(), req); err != nil || res.GetOrder().GetStatus() != cancelled {
		t.Errorf("after the order was cancelled, a repeat got %v, %v", res, err)
	}
}

func TestGRPCClientFindsTheServiceByReflection(t *testing.T) {
	t.Parallel()
	b := setup(t)
	addr := strings.TrimPrefix(b.url, "http://")
	conn, err := grpc.NewClient(addr, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	reflection, err := reflectionv1.NewServerReflectionClient(conn).ServerReflectionInfo(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := reflection.Send(&reflectionv1.ServerReflectionRequest{
		MessageRequest: &reflectionv1.ServerReflectionRequest_FileContainingSymbol{
			FileContainingSymbol: "orders.v1.OrderService",
		},
	}); err != nil {
		t.Fatal(err)
	}
	if res, err := reflection.Recv(); err != nil || len(res.GetFileDescriptorResponse().GetFileDescriptorProto()) == 0 {
		t.Errorf("reflection: got %v, %v", res, err)
	}
	var res ordersv1.PlaceOrderResponse
	err = conn.Invoke(t.Context(), ordersv1connect.OrderServicePlaceOrderProcedure, order(1, "apple"), &res)
	if err != nil || res.GetOrder().GetStatus() != placed {
		t.Errorf("got %v, %v", &res, err)
	}
}

func TestConcurrentRepeatsPlaceOneOrder(t *testing.T) {
	t.Parallel()
	b := setup(t)
	req := order(1, "apple")
	var calls sync.WaitGroup
	for range 100 {
		calls.Go(func() {
			if _, err := b.PlaceOrder(t.Context(), req); err != nil {
				t.Error(err)
			}
		})
	}
	calls.Wait()
	if n := b.count(t, `SELECT count(*) FROM orders`); n != 1 {
		t.Errorf("%d orders", n)
	}
	if messages := b.messages(t); len(messages) != 1 || messages[0].Key != req.OrderId {
		t.Errorf("got messages %v, want one whose key is the order", messages)
	}
}

func TestUnknownIsNotFound(t *testing.T) {
	t.Parallel()
	b := setup(t)
	id := uuid.NewString()
	_, err := b.GetOrder(t.Context(), &ordersv1.GetOrderRequest{OrderId: id})
	wantCode(t, err, connect.CodeNotFound, "")
	_, err = b.CancelOrder(t.Context(), &ordersv1.CancelOrderRequest{OrderId: id})
	wantCode(t, err, connect.CodeNotFound, "")
	_, err = b.GetStock(t.Context(), &ordersv1.GetStockRequest{Sku: "none"})
	wantCode(t, err, connect.CodeNotFound, "")
	stream, err := b.WatchOrder(t.Context(), &ordersv1.WatchOrderRequest{OrderId: id})
	if err == nil {
		_, err = stream.Receive()
		stream.Close()
	}
	wantCode(t, err, connect.CodeNotFound, "")
}

// The configuration gives the size of pages whose caller names none.
func TestListOrdersHasAConfiguredPageSize(t *testing.T) {
	t.Parallel()
	b := setup(t)
	for range 3 {
		if _, err := b.PlaceOrder(t.Context(), order(1, "apple")); err != nil {
			t.Fatal(err)
		}
	}
	service := orders.NewService(b.db, nil, changes.New(changes.Config{}), orders.Config{PageSize: 2})
	for size, want := range map[int32]int{0: 2, 1: 1, 3: 3} {
		page, err := service.ListOrders(t.Context(), &ordersv1.ListOrdersRequest{PageSize: size})
		if err != nil || len(page.GetOrders()) != want {
			t.Errorf("page size %d: got %d orders, %v, want %d", size, len(page.GetOrders()), err, want)
		}
	}
}

func TestListOrdersPages(t *testing.T) {
	t.Parallel()
	b := setup(t)
	var all []string // newest first
	for i := range 25 {
		req := order(1, "apple")
		req.CustomerId = fmt.Sprintf("customer-%d", i%2)
		if _, err := b.PlaceOrder(t.Context(), req); err != nil {
			t.Fatal(err)
		}
		all = slices.Insert(all, 0, req.OrderId)
	}
	b.cancel(t, all[3])
	odd := []string{} // customer-0 placed the 1st, 3rd, ... order; of 25, these are also the 1st, 3rd, ... newest
	for i := 0; i < len(all); i += 2 {
		odd = append(odd, all[i])
	}
	tests := map[string]struct {
		req  *ordersv1.ListOrdersRequest
		want []string
	}{
		"default size":   {&ordersv1.ListOrdersRequest{}, all},
		"one by one":     {&ordersv1.ListOrdersRequest{PageSize: 1}, all},
		"divides evenly": {&ordersv1.ListOrdersRequest{PageSize: 5}, all},
		"with remainder": {&ordersv1.ListOrdersRequest{PageSize: 7}, all},
		"by customer":    {&ordersv1.ListOrdersRequest{PageSize: 4, CustomerId: "customer-0"}, odd},
		"by status":      {&ordersv1.ListOrdersRequest{PageSize: 4, Status: cancelled}, all[3:4]},
		"by both":        {&ordersv1.ListOrdersRequest{PageSize: 4, Status: cancelled, CustomerId: "customer-0"}, nil},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var got []string
			for more := true; more; more = test.req.PageToken != "" {
				res, err := b.ListOrders(t.Context(), test.req)
				if err != nil {
					t.Fatal(err)
				}
				if size := int(test.req.PageSize); size > 0 && len(res.GetOrders()) > size {
					t.Errorf("page of %d orders", len(res.GetOrders()))
				}
				for _, order := range res.GetOrders() {
					got = append(got, order.GetId())
				}
				test.req.PageToken = res.GetNextPageToken()
			}
			if !slices.Equal(got, test.want) {
				t.Errorf("got %d orders %v, want %d", len(got), got, len(test.want))
			}
		})
	}
	for _, token := range []string{"x", "AAAA", strings.Repeat("_", 32), strings.Repeat("f", 32), "!"} {
		_, err := b.ListOrders(t.Context(), &ordersv1.ListOrdersRequest{PageToken: token})
		wantCode(t, err, connect.CodeInvalidArgument, "page_token is not one that ListOrders returned")
	}
}

func TestWatchOrderSendsEachState(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.setStock(t, 1, "apple")
	id := b.place(t, 1, "apple")
	stream, err := b.WatchOrder(t.Context(), &ordersv1.WatchOrderRequest{OrderId: id})
	if err != nil {
		t.Fatal(err)
	}
	defer stream.Close()
	want := func(status ordersv1.OrderStatus) {
		t.Helper()
		if res, err := stream.Receive(); err != nil || res.GetOrder().GetStatus() != status {
			t.Fatalf("got %v, %v, want %s", res, err, status)
		}
	}
	want(placed)
	b.deliver(t)
	want(confirmed)
	b.cancel(t, id)
	want(cancelled)
	if _, err := stream.Receive(); !errors.Is(err, io.EOF) {
		t.Errorf("after the last state: %v", err)
	}
}

func TestWatchOrderEndsWhenTheCallerLeaves(t *testing.T) {
	t.Parallel()
	b := setup(t)
	id := b.place(t, 1, "apple")
	ctx, leave := context.WithCancel(t.Context())
	stream, err := b.WatchOrder(ctx, &ordersv1.WatchOrderRequest{OrderId: id})
	if err != nil {
		t.Fatal(err)
	}
	defer stream.Close()
	if _, err := stream.Receive(); err != nil {
		t.Fatal(err)
	}
	leave()
	_, err = stream.Receive()
	wantCode(t, err, connect.CodeCanceled, "")
	// The server's Close in setup waits for the handler, so the test hangs if the handler does not end.
}

func TestDatabaseAway(t *testing.T) {
	t.Parallel()
	b := setup(t)
	req := order(1, "apple")
	b.link.away.Store(true)
	_, err := b.PlaceOrder(t.Context(), req)
	wantCode(t, err, connect.CodeUnavailable, "database is unavailable, try again")
	_, err = b.GetOrder(t.Context(), &ordersv1.GetOrderRequest{OrderId: req.OrderId})
	wantCode(t, err, connect.CodeUnavailable, "database is unavailable, try again")
	_, err = b.GetStock(t.Context(), &ordersv1.GetStockRequest{Sku: "apple"})
	wantCode(t, err, connect.CodeUnavailable, "database is unavailable, try again")
	_, err = b.ListOrders(t.Context(), new(ordersv1.ListOrdersRequest))
	wantCode(t, err, connect.CodeUnavailable, "database is unavailable, try again")
	b.link.away.Store(false)
	if _, err = b.PlaceOrder(t.Context(), req); err != nil {
		t.Errorf("after the database is available again: %v", err)
	}
}

// TestAnswerOfCommitLost cuts the connection between COMMIT and its answer: the order is placed, but the service does
// not know that.
func TestAnswerOfCommitLost(t *testing.T) {
	t.Parallel()
	b := setup(t)
	req := order(1, "apple")
	b.link.cutCommit.Store(true)
	_, err := b.PlaceOrder(t.Context(), req)
	wantCode(t, err, connect.CodeUnavailable,
		"the outcome is unknown: the call may or may not have been executed; "+
			"repeat it with the same ID, which is safe")
	if n := b.count(t, `SELECT count(*) FROM orders`); n != 1 {
		t.Fatalf("%d orders: the connection was cut elsewhere", n)
	}
	if _, err := b.PlaceOrder(t.Context(), req); err != nil {
		t.Errorf("repeat: %v", err)
	}
	if n := len(b.messages(t)); n != 1 {
		t.Errorf("outbox has %d messages, want 1", n)
	}
}

func TestInternalErrorsSayNothing(t *testing.T) {
	t.Parallel()
	b := setup(t)
	if _, err := b.db.Exec(t.Context(), `DROP TABLE stock, reservations, order_lines CASCADE`); err != nil {
		t.Fatal(err)
	}
	for method, body := range map[string]string{
		"PlaceOrder": `{"orderId":"6ba7b810-9dad-11d1-80b4-00c04fd430c8","customerId":"c",` +
			`"lines":[{"sku":"a","quantity":1}]}`,
		"GetOrder":   `{"orderId":"6ba7b810-9dad-11d1-80b4-00c04fd430c8"}`,
		"ListOrders": `{}`,
		"GetStock":   `{"sku":"a"}`,
		"SetStock":   `{"sku":"a","total":1}`,
	} {
		res, err := b.http.Post(b.url+"/orders.v1.OrderService/"+method, "application/json", strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		text, _ := io.ReadAll(res.Body)
		res.Body.Close()
		if string(text) != `{"code":"internal","message":"internal error"}` {
			t.Errorf("%s: got %s", method, text)
		}
	}
}
