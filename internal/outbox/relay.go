package outbox

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"time"

	"example.com/orders/internal/messaging"
	"github.com/cenkalti/backoff/v5"
	"github.com/google/uuid"
	"github.com/jackc/pgx/v5/pgxpool"
	"golang.org/x/sync/errgroup"
)

// Config sets up a Relay; the zero value is fit for production.
type Config struct {
	// Shard is the part of the log that the relay publishes. Default 0, the only one there is by default.
	Shard int16
	// PageRows is the most messages of one page. Two pages are in flight at most, so a crash of the relay repeats up to twice as many.
	// Default 1000: with two such pages in flight RabbitMQ, not the relay, is the limit; half of that costs a tenth of the rate.
	PageRows int
	// PageBytes is the most payload bytes of one page, and with it bounds the relay's memory. Default 4 MiB.
	PageBytes int
	// Lease is how long a relay that went silent keeps its shard, by the database's clock. Another one takes over within twice that. Default 5 s.
	Lease time.Duration
	// PollInterval is the longest time between two looks at the log when no doorbell rings. Default 1 s.
	PollInterval time.Duration
}

func (c Config) withDefaults() Config {
	c.PageRows = cmp.Or(c.PageRows, 1000)
	c.PageBytes = max(cmp.Or(c.PageBytes, 4<<20), messaging.MaxPayload)
	c.Lease = cmp.Or(c.Lease, 5*time.Second)
	c.PollInterval = cmp.Or(c.PollInterval, time.Second)
	return c
}

// Relay publishes the log of one shard, in order, for as long as it holds the shard's lease. Any number of relays may run.
type Relay struct {
	db        *pgxpool.Pool
	publisher messaging.Publisher
	wake      LocalBell
	owner     string
	config    Config
}

// NewRelay makes a Relay. It looks at the log when wake is rung, and at every poll interval.
func NewRelay(db *pgxpool.Pool, publisher messaging.Publisher, wake LocalBell, config Config) *Relay {
	host, _ := os.Hostname()
	return &Relay{
		db: db, publisher: publisher, wake: wake, config: config.withDefaults(),
		owner: fmt.Sprintf("%s/%d/%s", host, os.Getpid(), uuid.NewString()[:8]),
	}
}

// Run publishes until ctx is done, then waits for what is in flight and gives the lease back. It goes on through every failure of
// the database and the broker; the only error it returns is ErrForeignCluster.
func (r *Relay) Run(ctx context.Context) error {
	defer r.publisher.Close()
	pause := newPause(r.config.PollInterval)
	for ctx.Err() == nil {
		err := r.lead(ctx, pause)
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, ErrForeignCluster):
			return err
		case errors.Is(err, errNotLeased):
			wait(ctx, nil, r.config.Lease/4) // not a failure: be there when the lease ends
			continue
		}
		retryIn := pause.NextBackOff()
		slog.WarnContext(ctx, "relay interrupted", "shard", r.config.Shard, "error", err, "retry_in", retryIn)
		wait(ctx, nil, retryIn)
	}
	return nil
}

// acquireTimeout ends an attempt to take the lease: a database that vanished without a word is given up, and looked for anew.
const acquireTimeout = 10 * time.Second

// newPause spaces the tries after failures. What failed for one relay fails for all of them at once, hence the jitter.
func newPause(first time.Duration) *backoff.ExponentialBackOff {
	pause := backoff.NewExponentialBackOff()
	pause.InitialInterval = min(first, 100*time.Millisecond)
	pause.MaxInterval = 10 * time.Second
	return pause
}

// lead takes the lease and publishes until something fails.
func (r *Relay) lead(ctx context.Context, pause *backoff.ExponentialBackOff) error {
	limited, cancel := context.WithTimeout(ctx, acquireTimeout)
	held, at, err := acquire(limited, r.db, r.config.Shard, r.owner, r.config.Lease)
	cancel()
	if err != nil {
		return err
	}
	slog.InfoContext(ctx, "relay leads", "shard", r.config.Shard, "epoch", held.epoch, "owner", r.owner)
	defer func() {
		// Also when ctx is done: the next relay should not have to wait for the lease to end.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Second)
		defer cancel()
		if err := held.release(ctx); err != nil {
			slog.WarnContext(ctx, "lease not released, it will end by itself", "shard", r.config.Shard, "error", err)
		}
	}()
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return r.keepLease(ctx, held) })
	group.Go(func() error { return r.newRun(held, at, pause).loop(ctx) })
	return group.Wait()
}

// keepLease renews the lease at a third of its time. It runs beside the publishing, which may wait long for the broker. When it has not
// come through for a whole lease, it ends the run: the database may be gone without a word, and whoever waits for its answer with it.
func (r *Relay) keepLease(ctx context.Context, held *cursor) error {
	renewed := time.Now()
	for {
		if wait(ctx, nil, r.config.Lease/3); ctx.Err() != nil {
			return nil
		}
		began := time.Now()
		limited, cancel := context.WithTimeout(ctx, r.config.Lease/2)
		err := held.renew(limited, r.config.Lease)
		cancel()
		switch {
		case err == nil:
			renewed = began
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, errFenced):
			return err
		case time.Since(renewed) > r.config.Lease:
			return fmt.Errorf("lease not renewed for %s: %w", r.config.Lease, err)
		default:
			slog.WarnContext(ctx, "lease not renewed", "shard", r.config.Shard, "error", err)
		}
	}
}

// wait returns when the bell rings, after a time, or when ctx is done.
func wait(ctx context.Context, bell LocalBell, at time.Duration) {
	timer := time.NewTimer(at)
	defer timer.Stop()
	select {
	case <-ctx.Done():
	case <-bell:
	case <-timer.C:
	}
}

// MaxInFlight is the most messages that a relay with this configuration has without verdict: what its publisher must have room for.
func MaxInFlight(config Config) int { return maxInFlight * config.withDefaults().PageRows }
