package orders_test

import (
	"context"
	"errors"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect/v2"
	"example.com/shop/internal/changes"
	"example.com/shop/internal/dev/testenv"
	ordersv1 "example.com/shop/internal/gen/orders/v1"
	"example.com/shop/internal/orders"
	"example.com/shop/internal/outbox"
	"github.com/jackc/pgx/v5/pgxpool"
)

// A closed gate refuses calls that would write, and answers repeats.
func TestRepeatsAreAnsweredWhileTheBacklogIsFull(t *testing.T) {
	t.Parallel()
	b := setup(t)
	req, gone := order(1, "apple"), b.place(t, 1, "pear")
	if _, err := b.PlaceOrder(t.Context(), req); err != nil {
		t.Fatal(err)
	}
	b.cancel(t, gone)
	out := outbox.NewWriter(b.db, nil, closedGate(t, b.db))
	gated := orders.NewService(b.db, out, changes.New(changes.Config{}), orders.Config{})
	placed, err := gated.PlaceOrder(t.Context(), req)
	if err != nil || placed.GetOrder().GetId() != req.OrderId {
		t.Errorf("place an order again: %v, %v", placed, err)
	}
	other := order(2, "apple")
	other.OrderId = req.OrderId
	if _, err := gated.PlaceOrder(t.Context(), other); connect.CodeOf(err) != connect.CodeAlreadyExists {
		t.Errorf("place a different order with its ID: %v", err)
	}
	if _, err := gated.PlaceOrder(t.Context(), order(1, "apple")); !errors.Is(err, outbox.ErrBacklogFull) {
		t.Errorf("place a new order: %v", err)
	}
	called, err := gated.CancelOrder(t.Context(), &ordersv1.CancelOrderRequest{OrderId: gone})
	if err != nil || called.GetOrder().GetStatus() != cancelled {
		t.Errorf("cancel an order again: %v, %v", called, err)
	}
	_, err = gated.CancelOrder(t.Context(), &ordersv1.CancelOrderRequest{OrderId: req.OrderId})
	if !errors.Is(err, outbox.ErrBacklogFull) {
		t.Errorf("cancel another order: %v", err)
	}
}

// closedGate returns a gate that is closed, because the outbox contains a message and no relay runs.
func closedGate(t *testing.T, db *pgxpool.Pool) *outbox.Gate {
	t.Helper()
	if _, err := db.Exec(t.Context(), `SELECT outbox_insert('type', 'key', '')`); err != nil {
		t.Fatal(err)
	}
	gate := outbox.NewGate(db, outbox.GateConfig{MaxMessages: 1})
	ctx, cancel := context.WithCancel(t.Context())
	var running sync.WaitGroup
	running.Go(func() { gate.Run(ctx) })
	t.Cleanup(func() { cancel(); running.Wait() })
	testenv.Eventually(t, 20*time.Second, func() error {
		if gate.Check() == nil {
			return errors.New("the gate is open")
		}
		return nil
	})
	return gate
}
