//go:build unix

package main

import (
	"fmt"
	"math/rand/v2"
	"time"

	ordersv1 "example.com/shop/internal/gen/orders/v1"
	"github.com/google/uuid"
)

// What of the load is out of the ordinary, as shares of all orders.
const (
	repeatedShare  = 0.20 // placed by two or three calls at once
	impatientShare = 0.05 // placed by a caller who hangs up after some milliseconds and calls again
	cancelledShare = 0.03 // half of them at once, so mostly before they are confirmed, the others later
	scarceShare    = 0.13 // asks for something of which there is too little
)

const (
	commonSKUs = 6
	// scarceSupply is which part of the demand for scarce goods can be met. What is missing makes 5 to 10 % of all orders fail.
	scarceSupply = 0.4
)

// plannedOrder is an order that is to be placed.
type plannedOrder struct {
	id        string
	customer  string
	lines     []*ordersv1.Line
	calls     int  // at once, all with the same ID and content
	impatient bool // the first call is given up early
	cancel    bool // after it was placed
	cancelIn  time.Duration
}

// plan is the whole load, and the stock it meets.
type plan struct {
	orders []plannedOrder
	stock  map[string]int
}

// newPlan draws a load. The SKUs end in suffix, so that a load may have its own where there are others.
func newPlan(orders int, suffix string) plan {
	p := plan{stock: map[string]int{}}
	demand := map[string]int{}
	for range orders {
		one := plannedOrder{id: uuid.NewString(), customer: fmt.Sprintf("customer-%d", rand.IntN(200)), calls: 1}
		switch dice := rand.Float64(); {
		case dice < repeatedShare:
			one.calls = 2 + rand.IntN(2)
		case dice < repeatedShare+impatientShare:
			one.impatient = true
		}
		if one.cancel = rand.Float64() < cancelledShare; one.cancel && rand.IntN(2) == 0 {
			one.cancelIn = rand.N(2 * time.Second)
		}
		for _, n := range rand.Perm(commonSKUs)[:1+rand.IntN(2)] {
			one.lines = append(one.lines, line(fmt.Sprintf("common-%d%s", n+1, suffix)))
		}
		if rand.Float64() < scarceShare {
			one.lines = append(one.lines, line(fmt.Sprintf("scarce-%d%s", 1+rand.IntN(2), suffix)))
		}
		for _, line := range one.lines {
			demand[line.GetSku()] += int(line.GetQuantity())
		}
		p.orders = append(p.orders, one)
	}
	for sku, wanted := range demand {
		p.stock[sku] = wanted
		if sku[0] == 's' {
			p.stock[sku] = int(float64(wanted) * scarceSupply)
		}
	}
	return p
}

// ids are the orders' IDs, which are the keys of their messages too.
func (p plan) ids() []string {
	ids := make([]string, len(p.orders))
	for i, one := range p.orders {
		ids[i] = one.id
	}
	return ids
}

func line(sku string) *ordersv1.Line {
	return &ordersv1.Line{Sku: sku, Quantity: int32(1 + rand.IntN(3))}
}
