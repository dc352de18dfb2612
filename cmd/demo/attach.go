//go:build unix

package main

import (
	"context"
	"fmt"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5/pgxpool"
)

// attach places the load on a service that runs already, and balances what became of it. It breaks nothing; what breaks meanwhile is
// somebody else's doing, and has to balance all the same. Other orders may be there, from before or at the same time: the ledger is of
// ours alone, but for what lies on the queues.
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
