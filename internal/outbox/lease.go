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

// lease is the time for which a relay has, or tries to have, one shard.
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

// begin starts a lease. It lasts through failures of the database and the broker, until ctx is done or the shard is
// another's.
func (r *Relay) begin(ctx context.Context, shard int16) *lease {
	ctx, end := context.WithCancel(ctx)
	t := &lease{
		relay: r, shard: shard, publisher: r.newPublisher(), wake: NewLocalBell(),
		pause: newPause(r.config.PollInterval),
		end:   end, over: make(chan struct{}),
	}
	go func() {
		defer close(t.over)
		defer end()
		defer t.publisher.Close()
		t.serve(ctx)
		r.attention.Ring() // there may be something else to take
	}()
	return t
}

func (t *lease) isOver() bool {
	select {
	case <-t.over:
		return true
	default:
		return false
	}
}

// serve takes the lease and publishes, again and again.
func (t *lease) serve(ctx context.Context) {
	for {
		err := t.lead(ctx)
		switch {
		case ctx.Err() != nil, errors.Is(err, errNotLeased):
			return
		case errors.Is(err, errDrained):
			slog.InfoContext(ctx, "shard is drained", "shard", t.shard)
			return
		case errors.Is(err, errFenced):
			slog.WarnContext(ctx, "relay lost its shard, nothing more was moved", "shard", t.shard, "error", err)
			return
		}
		retryIn := t.pause.NextBackOff()
		slog.WarnContext(ctx, "relay interrupted", "shard", t.shard, "error", err, "retry_in", retryIn)
		wait(ctx, nil, retryIn)
	}
}

// lead takes the lease and publishes until something fails.
func (t *lease) lead(ctx context.Context) error {
	limited, cancel := context.WithTimeout(ctx, databaseTimeout)
	held, at, err := acquire(limited, t.relay.db, t.shard, t.relay.owner, t.relay.config.Lease)
	cancel()
	if err != nil {
		return err
	}
	if held.stolen {
		t.relay.meters.steals.Add(ctx, 1)
	}
	t.leads.Store(true)
	defer t.leads.Store(false)
	slog.InfoContext(ctx, "relay leads", "shard", t.shard, "epoch", held.epoch, "owner", t.relay.owner)
	defer func() {
		// Also when ctx is done: the next relay should not have to wait for the lease to end.
		if err := shortly(ctx, held.release); err != nil {
			slog.WarnContext(ctx, "lease not released, it will end by itself", "shard", t.shard, "error", err)
		}
	}()
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return t.keepLease(ctx, held) })
	group.Go(func() error { return t.newRun(held, at).loop(ctx) })
	return group.Wait()
}

// keepLease renews the lease at a third of its time. It runs beside the publishing, which may wait long for the broker.
// When it has not come through for a whole lease, it ends the run: the database may be gone without a word, and whoever
// waits for its answer with it.
func (t *lease) keepLease(ctx context.Context, held *cursor) error {
	lease := t.relay.config.Lease
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
			slog.WarnContext(ctx, "lease not renewed", "shard", t.shard, "error", err)
		}
	}
}
