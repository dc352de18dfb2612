//go:build unix

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
	"golang.org/x/sync/errgroup"
)

// demo contains the parts of a run.
type demo struct {
	flags  cli
	screen *screen
	box    *sandbox
	fleet  *fleet
	tap    *tap
	watch  *watch
	load   *load
	faults []fault
}

// run does everything from the build to the ledger, and reports whether the ledger balances.
func run(ctx context.Context, flags cli, screen *screen) (balanced bool, err error) {
	dir, err := os.MkdirTemp("", "shop-demo-")
	if err != nil {
		return false, err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	d := &demo{flags: flags, screen: screen}
	defer func() {
		// Report the cause of an aborted run, such as a process that ended, rather than the errors that followed from it.
		if cause := context.Cause(ctx); err != nil && cause != nil {
			err = cause
		}
		interrupted := errors.Is(err, context.Canceled)
		if interrupted {
			err = errors.New("stopped before the ledger")
		}
		err = errors.Join(err, d.clean(dir, flags.Keep || (!interrupted && (err != nil || !balanced))))
	}()

	binary := filepath.Join(dir, "orders")
	screen.event("building cmd/shop")
	if err := build(ctx, binary); err != nil {
		return false, err
	}
	if d.box, err = newSandbox(ctx, flags); err != nil {
		return false, err
	}
	screen.event("database %s and a vhost of the same name are ready", d.box.name)
	if d.fleet, err = newFleet(binary, dir, d.box, cancel); err != nil {
		return false, err
	}
	defer d.fleet.stop()
	if err := d.start(ctx); err != nil {
		return false, err
	}
	defer d.tap.close()
	defer d.watch.db.Close()
	if err := d.runLoad(ctx); err != nil {
		return false, err
	}
	return d.count(ctx)
}

// start prepares the schema and the broker, opens the tap and starts the processes.
func (d *demo) start(ctx context.Context) (err error) {
	if err := d.fleet.prepare(ctx, d.box); err != nil {
		return err
	}
	if d.tap, err = openTap(d.box.direct, nil); err != nil {
		return err
	}
	db, err := pgxpool.New(ctx, d.box.postgresURL)
	if err != nil {
		return fmt.Errorf("connect to postgres: %w", err)
	}
	d.watch = &watch{db: db}
	group, starting := errgroup.WithContext(ctx)
	for _, name := range processNames {
		group.Go(func() error { return d.fleet.start(starting, name) })
	}
	if err := group.Wait(); err != nil {
		return err
	}
	d.screen.event("api (pid %d), relay (pid %d) and consumer (pid %d) are ready; logs in %s",
		d.fleet.pid("api"), d.fleet.pid("relay"), d.fleet.pid("consumer"), d.fleet.dir)
	return nil
}

// runLoad places the orders and injects the faults meanwhile.
func (d *demo) runLoad(ctx context.Context) error {
	d.load = newLoad("http://"+d.fleet.addr("api"), d.fleet.apiKey, newPlan(d.flags.Orders, ""), d.flags.Rate)
	return d.place(ctx, d.injectFaults)
}

// place runs the load and meanwhile together, and then waits until all messages are applied.
func (d *demo) place(ctx context.Context, meanwhile func(context.Context) error) error {
	defer d.load.close()
	if err := d.load.stockUp(ctx); err != nil {
		return err
	}
	d.screen.event("placing %s orders over Connect, gRPC and gRPC-Web", grouped(d.flags.Orders))

	watching, stopWatching := context.WithCancel(ctx)
	watched := make(chan struct{})
	go func() {
		defer close(watched)
		d.watch.run(watching, d.showProgress)
	}()
	group, working := errgroup.WithContext(ctx)
	group.Go(func() error { return d.load.run(working) })
	group.Go(func() error { return meanwhile(working) })
	err := group.Wait()
	if err == nil {
		d.screen.event("load is over; waiting for the rest to settle")
		err = d.watch.settle(ctx, d.tap)
	}
	stopWatching()
	<-watched
	d.screen.endProgress()
	return err
}

func (d *demo) showProgress(now sample) {
	d.screen.progress(fmt.Sprintf("%s placed  %s published  %s applied  %s behind",
		grouped(int(d.load.placed.Load())), grouped(now.Published), grouped(now.Applied), grouped(now.backlog())),
		float64(d.load.placed.Load())/float64(d.flags.Orders))
}

// count stops the processes before it balances, so that unacked messages return to their queues.
func (d *demo) count(ctx context.Context) (balanced bool, err error) {
	if err := d.fleet.stop(); err != nil {
		return false, err
	}
	return d.balance(ctx)
}

// balance prints the ledger, and reports whether it balances.
func (d *demo) balance(ctx context.Context) (balanced bool, err error) {
	facts, err := d.readFacts(ctx)
	if err != nil {
		return false, err
	}
	findings := judge(facts)
	d.screen.block(report(facts, findings, d.load.summary(), d.faults))
	if len(findings) == 0 {
		d.screen.verdict(true, "Balanced: nothing lost, nothing doubled, order kept. %.0f s.",
			d.screen.elapsed().Seconds())
	} else {
		d.screen.verdict(false, "NOT balanced.")
	}
	return len(findings) == 0, nil
}

// clean removes the database, the vhost and the logs, or prints where they are.
func (d *demo) clean(dir string, keep bool) error {
	if keep && d.fleet != nil {
		d.screen.note("kept: database and vhost %s, logs in %s", d.box.name, dir)
		d.box.close()
		return nil
	}
	// Clean up after Ctrl-C too.
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	return errors.Join(d.box.remove(ctx), os.RemoveAll(dir))
}
