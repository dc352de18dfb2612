package orders_test

import (
	"context"
	"errors"
	"net/http/httptest"
	"strings"
	"testing"

	"connectrpc.com/connect/v2"
	"connectrpc.com/connect/v2/connecthttp"
	"example.com/shop/internal/dev/testenv"
	ordersv1 "example.com/shop/internal/gen/orders/v1"
	"example.com/shop/internal/gen/orders/v1/ordersv1connect"
	"github.com/google/uuid"
	"github.com/jackc/pgx/v5/pgxpool"
	"golang.org/x/sync/errgroup"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/descriptorpb"
)

// change is an idempotent call: repeated after the change is done, it reports success again.
type change struct {
	method protoreflect.Name
	call   func(client ordersv1connect.OrderServiceClient) error
}

// No procedure reports that a change was done already because of a row that a failover could revert.
func TestDoneAlreadySurvivesAFailover(t *testing.T) {
	t.Parallel()
	primary, standby := testenv.Replicated(t)
	before := clientOn(t, primary.URL())
	cancel := func(ctx context.Context) change {
		req := order(1, "apple")
		if _, err := before.PlaceOrder(t.Context(), req); err != nil {
			t.Fatal(err)
		}
		return change{"CancelOrder", func(client ordersv1connect.OrderServiceClient) error {
			_, err := client.CancelOrder(ctx, &ordersv1.CancelOrderRequest{OrderId: req.GetOrderId()})
			return err
		}}
	}
	place := func(ctx context.Context) change {
		req := order(1, "apple", "pear")
		return change{"PlaceOrder", func(client ordersv1connect.OrderServiceClient) error {
			_, err := client.PlaceOrder(ctx, req)
			return err
		}}
	}
	withKey := func() context.Context {
		ctx, info := connect.NewClientContext(t.Context())
		info.RequestHeader().Set("Idempotency-Key", uuid.NewString())
		return ctx
	}
	setStock := change{"SetStock", func(client ordersv1connect.OrderServiceClient) error {
		_, err := client.SetStock(t.Context(), &ordersv1.SetStockRequest{Sku: "apple", Total: 7})
		return err
	}}
	changes := []change{place(t.Context()), cancel(t.Context()), cancel(withKey()), setStock}
	wantEveryChange(t, changes)

	standby.Stop()
	for _, which := range []string{"first", "repeated"} {
		var all errgroup.Group
		for _, change := range changes {
			all.Go(func() error {
				var answer *connect.Error
				err := change.call(before)
				if !errors.As(err, &answer) || !strings.Contains(answer.Message(), "outcome is unknown") {
					t.Errorf("%s, %s: %v, want an unknown outcome", change.method, which, err)
				}
				return nil
			})
		}
		_ = all.Wait()
	}
	primary.Kill()
	after := clientOn(t, standby.Promote())
	for _, change := range changes {
		if err := change.call(after); err != nil {
			t.Errorf("%s, after the failover: %v", change.method, err)
		}
	}
}

// wantEveryChange checks that changes contains every procedure that has side effects.
func wantEveryChange(t *testing.T, changes []change) {
	t.Helper()
	methods := ordersv1.File_orders_v1_orders_proto.Services().ByName("OrderService").Methods()
	for i := range methods.Len() {
		method := methods.Get(i)
		options, _ := method.Options().(*descriptorpb.MethodOptions)
		tried := options.GetIdempotencyLevel() == descriptorpb.MethodOptions_NO_SIDE_EFFECTS ||
			method.IsStreamingServer()
		for _, change := range changes {
			tried = tried || change.method == method.Name()
		}
		if !tried {
			t.Errorf("%s has side effects, but the test does not call it", method.Name())
		}
	}
}

// clientOn serves the domain on the database at url, and returns a client.
func clientOn(t *testing.T, url string) ordersv1connect.OrderServiceClient {
	t.Helper()
	db, err := pgxpool.New(t.Context(), url)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(db.Close)
	server := httptest.NewServer(edge(newService(t, db, func(*pgxpool.Config) {})))
	t.Cleanup(server.Close)
	return ordersv1connect.NewOrderServiceClient(connect.NewClient(connecthttp.NewTransport(server.Client(),
		server.URL)))
}
