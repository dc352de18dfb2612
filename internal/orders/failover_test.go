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

// change is a procedure that changes something, and says the same when it finds it changed already.
type change struct {
	method protoreflect.Name
	call   func(client ordersv1connect.OrderServiceClient) error
}

// No procedure says that something is done already on the strength of a row that a failover could take back.
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
	changes := []change{place(t.Context()), cancel(t.Context()), cancel(withKey()), {"SetStock", func(client ordersv1connect.OrderServiceClient) error {
		_, err := client.SetStock(t.Context(), &ordersv1.SetStockRequest{Sku: "apple", Total: 7})
		return err
	}}}
	wantEveryChange(t, changes)

	standby.Stop()
	for _, which := range []string{"first", "repeated"} {
		var all errgroup.Group
		for _, one := range changes {
			all.Go(func() error {
				var answer *connect.Error
				if err := one.call(before); !errors.As(err, &answer) || !strings.Contains(answer.Message(), "outcome is unknown") {
					t.Errorf("%s, %s: %v, want an unknown outcome", one.method, which, err)
				}
				return nil
			})
		}
		_ = all.Wait()
	}
	primary.Kill()
	after := clientOn(t, standby.Promote())
	for _, one := range changes {
		if err := one.call(after); err != nil {
			t.Errorf("%s, after the failover: %v", one.method, err)
		}
	}
}

// wantEveryChange fails for a procedure that is neither declared to have no side effects nor among changes.
func wantEveryChange(t *testing.T, changes []change) {
	t.Helper()
	methods := ordersv1.File_orders_v1_orders_proto.Services().ByName("OrderService").Methods()
	for i := range methods.Len() {
		method := methods.Get(i)
		options, _ := method.Options().(*descriptorpb.MethodOptions)
		tried := options.GetIdempotencyLevel() == descriptorpb.MethodOptions_NO_SIDE_EFFECTS || method.IsStreamingServer()
		for _, one := range changes {
			tried = tried || one.method == method.Name()
		}
		if !tried {
			t.Errorf("%s changes something, and is not tried", method.Name())
		}
	}
}

// clientOn serves the domain on a database, and returns a client.
func clientOn(t *testing.T, url string) ordersv1connect.OrderServiceClient {
	t.Helper()
	db, err := pgxpool.New(t.Context(), url)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(db.Close)
	server := httptest.NewServer(edge(newService(t, db, func(*pgxpool.Config) {})))
	t.Cleanup(server.Close)
	return ordersv1connect.NewOrderServiceClient(connect.NewClient(connecthttp.NewTransport(server.Client(), server.URL)))
}
