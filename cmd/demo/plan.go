//go:build unix

package main

import (
	"fmt"
	"math/rand/v2"
	"time"

	ordersv1 "example.com/shop/internal/gen/orders/v1"
	"github.com/google/uuid"
)

// The unusual parts of the load, as shares of all orders.
const (
	repeatedShare  = 0.20 // placed by two or three concurrent calls
	impatientShare = 0.05 // placed by a caller that hangs up after some milliseconds and retries
	cancelledShare = 0.03 // half of them immediately, so mostly before they are confirmed, the others later
	scarceShare    = 0.13 // contains a scarce SKU
)

const (
	commonSKUs = 6
	// scarceSupply is the share of the demand for scarce SKUs that the stock covers. The shortage rejects 5 to 10 % of all
	// orders.
	scarceSupply = 0.4
)

// plannedOrder is an order of the load.
type plannedOrder struct {
	id        string
	customer  string
	lines     []*ordersv1.Line
	calls     int  // concurrent, all with the same ID and content
	impatient bool // the first call has a short timeout
	cancel    bool // after it was placed
	cancelIn  time.Duration
}

// plan contains the whole load and the initial stock.
type plan struct {
	orders []plannedOrder
	stock  map[string]int
}

// newPlan makes a random load. Its SKUs end in suffix, which separates them from those of other loads.
func newPlan(orders int, suffix string) plan {
	p := plan{stock: map[string]int{}}
	demand := map[string]int{}
	for range orders {
		order := plannedOrder{id: uuid.NewString(), customer: fmt.Sprintf("customer-%d", rand.IntN(200)), calls: 1}
		switch dice := rand.Float64(); {
		case dice < repeatedShare:
			order.calls = 2 + rand.IntN(2)
		case dice < repeatedShare+impatientShare:
			order.impatient = true
		}
		if order.cancel = rand.Float64() < cancelledShare; order.cancel && rand.IntN(2) == 0 {
			order.cancelIn = rand.N(2 * time.Second)
		}
		for _, n := range rand.Perm(commonSKUs)[:1+rand.IntN(2)] {
			order.lines = append(order.lines, line(fmt.Sprintf("common-%d%s", n+1, suffix)))
		}
		if rand.Float64() < scarceShare {
			order.lines = append(order.lines, line(fmt.Sprintf("scarce-%d%s", 1+rand.IntN(2), suffix)))
		}
		for _, line := range order.lines {
			demand[line.GetSku()] += int(line.GetQuantity())
		}
		p.orders = append(p.orders, order)
	}
	for sku, wanted := range demand {
		p.stock[sku] = wanted
		if sku[0] == 's' {
			p.stock[sku] = int(float64(wanted) * scarceSupply)
		}
	}
	return p
}

// ids returns the orders' IDs, which are also the keys of their messages.
func (p plan) ids() []string {
	ids := make([]string, len(p.orders))
	for i, order := range p.orders {
		ids[i] = order.id
	}
	return ids
}

func line(sku string) *ordersv1.Line {
	return &ordersv1.Line{Sku: sku, Quantity: int32(1 + rand.IntN(3))}
}
