package orders_test

import (
	"math/rand/v2"
	"slices"
	"sync"
	"testing"

	"connectrpc.com/connect/v2"
	ordersv1 "example.com/shop/internal/gen/orders/v1"
	"example.com/shop/internal/inbox"
	"example.com/shop/internal/messaging"
	"github.com/google/uuid"
	"pgregory.net/rapid"
)

func TestFulfillmentConfirmsWhatIsInStock(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.setStock(t, 10, "apple", "pear")
	id := b.place(t, 4, "pear", "apple")
	b.wantStock(t, "apple", 10, 0)
	b.deliver(t)
	b.wantStatus(t, id, confirmed)
	b.wantStock(t, "apple", 6, 4)
	b.wantStock(t, "pear", 6, 4)
	b.checkInvariants(t)
}

func TestFulfillmentRejectsWhatIsMissingAndReservesNothing(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.setStock(t, 10, "apple")
	b.setStock(t, 3, "pear")
	id := b.place(t, 4, "apple", "pear", "unknown")
	b.deliver(t)
	if reason := b.wantStatus(t, id, rejected).GetRejectReason(); reason != "not enough stock: pear, unknown" {
		t.Errorf("reason is %q", reason)
	}
	b.wantStock(t, "apple", 10, 0)
	b.wantStock(t, "pear", 3, 0)
	b.checkInvariants(t)
	_, err := b.CancelOrder(t.Context(), &ordersv1.CancelOrderRequest{OrderId: id})
	wantCode(t, err, connect.CodeFailedPrecondition, "order "+id+" is rejected")
}

func TestCancelReleasesWhatWasReserved(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.setStock(t, 10, "apple", "pear")
	kept, id := b.place(t, 1, "apple"), b.place(t, 4, "apple", "pear")
	b.deliver(t)
	first := b.cancel(t, id)
	b.deliver(t)
	b.wantStock(t, "apple", 9, 1)
	b.wantStock(t, "pear", 10, 0)
	b.wantStatus(t, kept, confirmed)
	b.checkInvariants(t)
	again := b.cancel(t, id)
	if again.GetStatus() != cancelled || !again.GetUpdatedAt().AsTime().Equal(first.GetUpdatedAt().AsTime()) {
		t.Errorf("cancelled twice: got %v, then %v", first, again)
	}
	if n := len(b.messages(t)); n != 0 {
		t.Errorf("the second cancellation sent %d messages", n)
	}
}

func TestOrderCancelledBeforeFulfillmentReservesNothing(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.setStock(t, 10, "apple")
	id := b.place(t, 4, "apple")
	b.cancel(t, id)
	b.deliver(t)
	b.wantStatus(t, id, cancelled)
	b.wantStock(t, "apple", 10, 0)
	b.checkInvariants(t)
	if n := b.count(t, `SELECT count(*) FROM notifications`); n != 0 {
		t.Errorf("%d notifications", n)
	}
}

func TestSetStockKeepsWhatIsReserved(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.setStock(t, 10, "apple")
	b.place(t, 4, "apple")
	b.deliver(t)
	_, err := b.SetStock(t.Context(), &ordersv1.SetStockRequest{Sku: "apple", Total: 3})
	wantCode(t, err, connect.CodeFailedPrecondition, "more than 3 pieces of apple are reserved")
	b.wantStock(t, "apple", 6, 4)
	b.setStock(t, 4, "apple")
	b.wantStock(t, "apple", 0, 4)
}

func TestEveryEventHasAGroup(t *testing.T) {
	t.Parallel()
	b := setup(t)
	var handled []string
	for _, group := range b.groups {
		handled = append(handled, group.Types()...)
	}
	events := ordersv1.File_orders_v1_events_proto.Messages()
	for i := range events.Len() {
		if name := string(events.Get(i).FullName()); !slices.Contains(handled, name) {
			t.Errorf("no group handles %s, so nobody hears it", name)
		}
	}
}

// TestRacesForStock lets consumers, a caller that cancels orders, and a caller that sets the stock compete for a few
// SKUs.
func TestRacesForStock(t *testing.T) {
	t.Parallel()
	b := setup(t)
	skus := numbered(4)
	b.setStock(t, 15, skus...)
	var ids []string
	for range 60 {
		wanted := slices.Clone(skus)
		rand.Shuffle(len(wanted), func(i, j int) { wanted[i], wanted[j] = wanted[j], wanted[i] })
		ids = append(ids, b.place(t, 1+rand.Int32N(2), wanted[:1+rand.IntN(3)]...))
	}
	batch := b.messages(t)
	var racing sync.WaitGroup
	for part := range slices.Chunk(batch, len(batch)/4) {
		racing.Go(func() {
			box := inbox.New(b.db, b.groups[0], inbox.Config{})
			for _, message := range part { // one transaction per message, so the consumers wait for each other's locks
				if err := box.Process(t.Context(), []messaging.Delivery{message}); err != nil {
					t.Error(err)
				}
			}
		})
	}
	racing.Go(func() {
		for i := 0; i < len(ids); i += 3 {
			_, err := b.CancelOrder(t.Context(), &ordersv1.CancelOrderRequest{OrderId: ids[i]})
			if err != nil && connect.CodeOf(err) != connect.CodeFailedPrecondition { // rejected by now
				t.Error(err)
			}
		}
	})
	racing.Go(func() {
		for i := range int32(20) {
			b.setStock(t, 15+i/4, skus...)
		}
	})
	racing.Wait()
	b.deliver(t)
	b.checkInvariants(t)
	if n := b.count(t, `SELECT count(*) FROM orders WHERE status = 'rejected'`); n == 0 {
		t.Error("no order was rejected: there was no race for stock")
	}
}

// TestAgainstAModel compares the service with a model of twenty lines, step by step, for schedules that rapid chooses.
func TestAgainstAModel(t *testing.T) {
	t.Parallel()
	b := setup(t)
	rapid.Check(t, func(r *rapid.T) {
		prefix := uuid.NewString()[:8] + "-" // the runs share a database, so each uses its own SKUs
		skus := []string{prefix + "a", prefix + "b"}
		total, reserved := map[string]int32{}, map[string]int32{}
		type known struct {
			*ordersv1.PlaceOrderRequest
			status ordersv1.OrderStatus
		}
		var all []*known
		var undelivered []*known
		settle := func() {
			b.deliver(t)
			for _, o := range undelivered {
				if o.status != placed {
					continue
				}
				o.status = confirmed
				for _, line := range o.Lines {
					if total[line.Sku]-reserved[line.Sku] < line.Quantity {
						o.status = rejected
					}
				}
				for _, line := range o.Lines {
					if o.status == confirmed {
						reserved[line.Sku] += line.Quantity
					}
				}
			}
			undelivered = nil
		}
		for range rapid.IntRange(1, 12).Draw(r, "steps") {
			switch action := rapid.SampledFrom([]string{"place", "place", "cancel", "stock", "settle"}).Draw(r,
				"action"); {
			case action == "place":
				n := rapid.IntRange(1, 2).Draw(r, "lines")
				o := &known{order(rapid.Int32Range(1, 5).Draw(r, "quantity"), skus[:n]...), placed}
				if _, err := b.PlaceOrder(t.Context(), o.PlaceOrderRequest); err != nil {
					r.Fatal(err)
				}
				all, undelivered = append(all, o), append(undelivered, o)
			case action == "cancel" && len(all) > 0:
				o := rapid.SampledFrom(all).Draw(r, "order")
				_, err := b.CancelOrder(t.Context(), &ordersv1.CancelOrderRequest{OrderId: o.OrderId})
				if failed := err != nil; failed != (o.status == rejected) {
					r.Fatalf("cancel an order that is %s: %v", o.status, err)
				}
				if o.status == confirmed {
					settle() // its stock is released when the event arrives
					for _, line := range o.Lines {
						reserved[line.Sku] -= line.Quantity
					}
				}
				if o.status != rejected {
					o.status = cancelled
				}
			case action == "stock":
				sku, n := rapid.SampledFrom(skus).Draw(r, "sku"), rapid.Int32Range(0, 12).Draw(r, "total")
				_, err := b.SetStock(t.Context(), &ordersv1.SetStockRequest{Sku: sku, Total: n})
				if failed := err != nil; failed != (n < reserved[sku]) {
					r.Fatalf("set stock to %d with %d reserved: %v", n, reserved[sku], err)
				}
				if n >= reserved[sku] {
					total[sku] = n
				}
			case action == "settle":
				settle()
			}
		}
		settle()
		for _, o := range all {
			b.wantStatus(t, o.OrderId, o.status)
		}
		for sku := range total {
			b.wantStock(t, sku, total[sku]-reserved[sku], reserved[sku])
		}
		if t.Failed() {
			r.Fatal("the checks above failed")
		}
	})
	b.checkInvariants(t)
}

// SetStock accepts idempotency keys: a repeat gets the stored response of the first call.
func TestSetStockHonoursKeys(t *testing.T) {
	t.Parallel()
	b := setup(t)
	set := func(total int32, key string) (*ordersv1.Stock, error) {
		ctx, info := connect.NewClientContext(t.Context())
		info.RequestHeader().Set("Idempotency-Key", key)
		res, err := b.SetStock(ctx, &ordersv1.SetStockRequest{Sku: "apple", Total: total})
		return res.GetStock(), err
	}
	for range 2 {
		if stock, err := set(10, "first"); err != nil || stock.GetTotal() != 10 {
			t.Errorf("stock is %v, %v", stock, err)
		}
		b.setStock(t, 20, "apple") // without a key
	}
	b.wantStock(t, "apple", 20, 0)
	_, err := set(11, "first")
	wantCode(t, err, connect.CodeAlreadyExists, "the idempotency key was used for another request")
	_, err = set(-1, "second")
	wantCode(t, err, connect.CodeInvalidArgument, "")
	if _, err := set(30, "second"); err != nil {
		t.Errorf("an invalid call used up its key: %v", err)
	}
}
