//go:build unix

package main

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// fault is a fault that was injected.
type fault struct {
	kind   string
	at     time.Time
	healed time.Time // when every message committed by the end of the outage was applied
}

// schedule lists the faults, each with the share of the load at which it happens.
var schedule = []struct {
	share float64
	run   func(d *demo, ctx context.Context) error
}{
	{0.20, (*demo).killRelay},
	{0.35, (*demo).killConsumer},
	{0.55, (*demo).killRelay},
	{0.65, (*demo).cutConnections},
	{0.75, (*demo).killConsumer},
}

func (d *demo) injectFaults(ctx context.Context) error {
	ticker := time.NewTicker(10 * time.Millisecond)
	defer ticker.Stop()
	for _, next := range schedule {
		for d.load.progress() < next.share {
			select {
			case <-ctx.Done():
				return ctx.Err()
			case <-ticker.C:
			}
		}
		if err := next.run(d, ctx); err != nil {
			return err
		}
	}
	return nil
}

func (d *demo) killRelay(ctx context.Context) error {
	return d.killAndRestart(ctx, "relay", "took over the lease", func(before, now sample) bool {
		return now.Epoch > before.Epoch
	})
}

func (d *demo) killConsumer(ctx context.Context) error {
	return d.killAndRestart(ctx, "consumer", "applied the first message", func(before, now sample) bool {
		return now.Applied > before.Applied || d.over(now)
	})
}

// killAndRestart kills a process and restarts it immediately, as a supervisor does.
func (d *demo) killAndRestart(
	ctx context.Context, name, sign string, recovered func(before, now sample) bool,
) error {
	at := time.Now()
	pid := d.fleet.kill(name)
	before, err := d.watch.sample(ctx)
	if err != nil {
		return err
	}
	d.screen.event("%s killed (pid %d)", name, pid)
	if err := d.fleet.start(ctx, name); err != nil {
		return err
	}
	return d.heal(ctx, fault{kind: name + " killed", at: at}, func(took float64) string {
		return fmt.Sprintf("%s back (pid %d), %s after %.1f s", name, d.fleet.pid(name), sign, took)
	}, func(now sample) bool { return recovered(before, now) })
}

func (d *demo) cutConnections(ctx context.Context) error {
	at := time.Now()
	cut := d.box.proxy.cut()
	before, err := d.watch.sample(ctx)
	if err != nil {
		return err
	}
	d.screen.event("all %d connections to RabbitMQ cut", cut)
	return d.heal(ctx, fault{kind: "connections cut", at: at}, func(took float64) string {
		return fmt.Sprintf("all connected again, publishing and applying after %.1f s", took)
	}, func(now sample) bool {
		return d.over(now) ||
			d.box.proxy.open() >= cut && now.Published > before.Published && now.Applied > before.Applied
	})
}

// over reports that no message is left that could show a recovery, which happens if the load is short.
func (d *demo) over(now sample) bool { return d.load.progress() >= 1 && now.quiet() }

// heal waits until the service has recovered, and then until it has caught up.
func (d *demo) heal(
	ctx context.Context, f fault, describe func(took float64) string, recovered func(sample) bool,
) error {
	now, err := d.watch.await(ctx, recoveryPatience, recovered)
	if err == nil {
		took := time.Since(f.at).Seconds()
		_, err = d.watch.await(ctx, recoveryPatience, func(later sample) bool {
			return later.Applied+later.Parked >= now.Messages
		})
		if err == nil {
			f.healed = time.Now()
			d.faults = append(d.faults, f)
			d.screen.event("%s; caught up after %.1f s", describe(took), f.healed.Sub(f.at).Seconds())
			return nil
		}
	}
	if errors.Is(err, errNoRecovery) {
		return fmt.Errorf("%s: %w", f.kind, err)
	}
	return err
}
