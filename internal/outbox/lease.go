package outbox

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync/atomic"
	"time"

	"example.com/shop/internal/messaging"
	"github.com/cenkalti/backoff/v5"
	"golang.org/x/sync/errgroup"
)

// lease is a relay's tenure, or its attempt at one, over one shard.
type lease struct {
	relay     *Relay
	shard     int16
	publisher messaging.Publisher
	wake      LocalBell
	pause     *backoff.ExponentialBackOff
	leads     atomic.Bool
	problem   problem
	end       context.CancelFunc
	over      chan struct{}
}

// begin starts a lease. It survives failures of the database and the broker, and ends when ctx is done, the shard is
// drained, or another relay holds the shard.
func (r *Relay) begin(ctx context.Context, shard int16) *lease {
	ctx, end := context.WithCancel(ctx)
	l := &lease{
		relay: r, shard: shard, publisher: r.newPublisher(), wake: NewLocalBell(), pause: newPause(r.config.PollInterval),
		end: end, over: make(chan struct{}),
	}
	go func() {
		defer close(l.over)
		defer end()
		defer l.publisher.Close()
		l.serve(ctx)
		r.attention.Ring() // there may be another shard to take
	}()
	return l
}

func (l *lease) isOver() bool {
	select {
	case <-l.over:
		return true
	default:
		return false
	}
}

// serve takes the lease and publishes, and repeats that after a failure.
func (l *lease) serve(ctx context.Context) {
	for {
		err := l.lead(ctx)
		switch {
		case ctx.Err() != nil, errors.Is(err, errNotLeased):
			return
		case errors.Is(err, errDrained):
			slog.InfoContext(ctx, "shard is drained", "shard", l.shard)
			return
		case errors.Is(err, errFenced):
			slog.WarnContext(ctx, "relay lost its shard, nothing more was moved", "shard", l.shard, "error", err)
			return
		}
		retryIn := l.pause.NextBackOff()
		slog.WarnContext(ctx, "relay interrupted", "shard", l.shard, "error", err, "retry_in", retryIn)
		wait(ctx, nil, retryIn)
	}
}

// lead takes the lease and publishes until something fails.
func (l *lease) lead(ctx context.Context) error {
	limited, cancel := context.WithTimeout(ctx, databaseTimeout)
	held, at, err := acquire(limited, l.relay.db, l.shard, l.relay.owner, l.relay.config.Lease)
	cancel()
	if err != nil {
		return err
	}
	if held.stolen {
		l.relay.meters.steals.Add(ctx, 1)
	}
	l.leads.Store(true)
	defer l.leads.Store(false)
	slog.InfoContext(ctx, "relay leads", "shard", l.shard, "epoch", held.epoch, "owner", l.relay.owner)
	defer func() {
		// Release even if ctx is done, so that the next relay need not wait for the lease to expire.
		if err := shortly(ctx, held.release); err != nil {
			slog.WarnContext(ctx, "lease not released, it will expire", "shard", l.shard, "error", err)
		}
	}()
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return l.keepLease(ctx, held) })
	group.Go(func() error { return l.newRun(held, at).loop(ctx) })
	return group.Wait()
}

// keepLease renews the lease every third of its duration. It runs beside the run, which may wait long for the broker.
// If no renewal succeeds for a whole lease, it ends the run, which may be waiting for a database that vanished without
// closing the connection.
func (l *lease) keepLease(ctx context.Context, held *cursor) error {
	lease := l.relay.config.Lease
	renewed := time.Now()
	for {
		if wait(ctx, nil, lease/3); ctx.Err() != nil {
			return nil
		}
		began := time.Now()
		limited, cancel := context.WithTimeout(ctx, lease/2)
		err := held.renew(limited, lease)
		cancel()
		switch {
		case err == nil:
			renewed = began
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, errFenced):
			return err
		case time.Since(renewed) > lease:
			return fmt.Errorf("lease not renewed for %s: %w", lease, err)
		default:
			slog.WarnContext(ctx, "lease not renewed", "shard", l.shard, "error", err)
		}
	}
}
