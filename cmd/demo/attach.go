//go:build unix

package main

import (
	"context"
	"fmt"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5/pgxpool"
)

// attach places the load on a running service and balances the ledger. It breaks nothing, but the ledger must balance
// even if something else breaks meanwhile. The service may have other orders, older or concurrent ones. The ledger
// covers only our own, except for the messages left on the queues.
func attach(ctx context.Context, flags cli, screen *screen) (balanced bool, err error) {
	d := &demo{flags: flags, screen: screen}
	d.load = newLoad(flags.Attach, flags.APIKey, newPlan(flags.Orders, "-"+uuid.NewString()[:8]), flags.Rate)
	db, err := pgxpool.New(ctx, flags.PostgresURL)
	if err != nil {
		return false, fmt.Errorf("connect to postgres: %w", err)
	}
	defer db.Close()
	d.watch = &watch{db: db, orders: d.load.plan.ids()}
	if d.tap, err = openTap(flags.AMQPURL, d.watch.orders); err != nil {
		return false, err
	}
	defer d.tap.close()
	screen.event("attached to %s", flags.Attach)
	if err := d.place(ctx, func(context.Context) error { return nil }); err != nil {
		return false, err
	}
	return d.balance(ctx)
}
