package outbox

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"sync"
	"time"

	"example.com/shop/internal/messaging"
	"example.com/shop/internal/postgres"
	"example.com/shop/internal/session"
	"github.com/cenkalti/backoff/v5"
	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/metric"
	"go.opentelemetry.io/otel/trace"
)

// Config configures a Relay. The zero value is suitable for production.
type Config struct {
	// PageRows is the maximum number of messages in one page. At most two pages are in flight, so a crash of the relay
	// repeats up to twice as many. Default 1000: with two such pages in flight, RabbitMQ limits the rate, not the relay.
	// With 500, the rate is a tenth lower.
	PageRows int
	// PageBytes is the maximum number of payload bytes in one page. It bounds the relay's memory. Default 4 MiB.
	PageBytes int
	// Lease is how long a relay that went silent keeps its shards, by the database's clock. Another relay takes over
	// within twice that time. Default 5 s.
	Lease time.Duration
	// PollInterval is the longest time between two polls of the log when no doorbell rings. Default 1 s.
	PollInterval time.Duration
	// Retention is the minimum time that delivered messages stay in the log, for inspection and replay. Default 24 h.
	Retention time.Duration
	// Handled lists the types that the service's own consumer groups handle. A message of another type is delivered even
	// if no queue is bound for it, unless its proto file says that it must be heard: the relay counts it, and a replay can
	// publish it again. Default: every message must be heard.
	Handled []string
	// MeterProvider receives the metrics. Default: the global one.
	MeterProvider metric.MeterProvider
	// TracerProvider receives a span for each published message whose trace is recorded. Default: none.
	TracerProvider trace.TracerProvider
}

// MaxRetention is the longest Retention. The ring of slots wraps around after 40 hours, and one slot of eight hours is
// being written.
const MaxRetention = 32 * time.Hour

func (c Config) withDefaults() Config {
	c.PageRows = cmp.Or(c.PageRows, 1000)
	c.PageBytes = max(cmp.Or(c.PageBytes, 4<<20), messaging.MaxPayload)
	c.Lease = cmp.Or(c.Lease, 5*time.Second)
	c.PollInterval = cmp.Or(c.PollInterval, time.Second)
	c.Retention = cmp.Or(c.Retention, 24*time.Hour)
	if c.MeterProvider == nil {
		c.MeterProvider = otel.GetMeterProvider()
	}
	return c
}

// Relay publishes the log, each shard in order. Any number of relays may run. They distribute the shards among
// themselves, and the relay that holds a shard's lease publishes it.
type Relay struct {
	db           *pgxpool.Pool
	newPublisher func() messaging.Publisher
	owner        string
	config       Config
	attention    LocalBell // rung when there may be a shard to take

	meters  meters
	spans   spanMaker
	backlog measured
	unheard unheard

	mu     sync.Mutex
	leases map[int16]*lease
	view   []shardView // the result of the last viewSQL
}

// NewRelay returns a Relay. It makes one publisher for each shard that it holds.
func NewRelay(db *pgxpool.Pool, newPublisher func() messaging.Publisher, config Config) *Relay {
	host, _ := os.Hostname()
	r := &Relay{
		db: db, newPublisher: newPublisher, config: config.withDefaults(),
		attention: NewLocalBell(), leases: map[int16]*lease{},
		owner: fmt.Sprintf("%s/%d/%s", host, os.Getpid(), uuid.NewString()[:8]),
	}
	r.meters, r.spans = r.newMeters(), newSpanMaker(r.config.TracerProvider)
	return r
}

// Ring makes the relay poll the log now. It makes the Relay a Bell for writers in the same process.
func (r *Relay) Ring() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, held := range r.leases {
		held.wake.Ring()
	}
}

// Listen receives the doorbells of other processes until ctx is done, on a direct connection to url. A relay that does
// not listen finds their messages by polling.
func (r *Relay) Listen(ctx context.Context, url string) {
	session.Listen(ctx, url, Channel, func(payload string) {
		if payload == leaseNews {
			r.attention.Ring()
		} else {
			r.Ring()
		}
	})
}

// Run publishes until ctx is done. Then it waits for the pages in flight and releases the leases. It survives every
// failure of the database and the broker; the only error that it returns is ErrForeignCluster.
func (r *Relay) Run(ctx context.Context) error {
	work, cancel := context.WithCancel(context.WithoutCancel(ctx))
	var chores sync.WaitGroup
	chores.Go(func() { r.sweepPeriodically(work) })
	chores.Go(func() { r.moveDue(work) })
	chores.Go(func() { r.measure(work) })
	defer func() {
		r.leave(ctx) // first: while this relay is listed, others leave its share of the shards to it
		cancel()
		r.waitForLeases()
		chores.Wait()
	}()
	pause := newPause(r.config.PollInterval)
	for ctx.Err() == nil {
		next := r.config.Lease / 4 // take a shard soon after its lease has expired
		err := r.attend(ctx, work)
		switch {
		case errors.Is(err, ErrForeignCluster):
			return err
		case err != nil && ctx.Err() == nil:
			next = pause.NextBackOff()
			slog.WarnContext(ctx, "relay cannot read the list of shards", "error", err, "retry_in", next)
		default:
			pause.Reset()
		}
		wait(ctx, r.attention, next)
	}
	return nil
}

// newPause spaces retries. A failure often hits all relays at once, hence the jitter.
func newPause(first time.Duration) *backoff.ExponentialBackOff {
	pause := backoff.NewExponentialBackOff()
	pause.InitialInterval = min(first, 100*time.Millisecond)
	pause.MaxInterval = 10 * time.Second
	return pause
}

// databaseTimeout bounds statements that should be quick. If the database vanishes without closing the connection, the
// relay gives the connection up and connects again.
const databaseTimeout = 10 * time.Second

const aliveSQL = `
INSERT INTO outbox_relay (owner, expires_at, lease, problem) VALUES ($1, clock_timestamp() + $2, $2, $3)
ON CONFLICT (owner) DO UPDATE SET expires_at = excluded.expires_at, lease = excluded.lease, problem = excluded.problem`

const viewSQL = `
SELECT shard, ` + nativeSQL + `, CASE WHEN clock_holds(lease_expires_at, lease) THEN owner ELSE '' END AS holder,
    (SELECT array_agg(owner) FROM outbox_relay WHERE clock_holds(expires_at, lease)) AS relays
FROM outbox_cursor WHERE ` + readableSQL + `
ORDER BY shard`

// attend reports that this relay is alive, takes shards if it has less than its share, and gives up one shard if
// another relay has too few.
func (r *Relay) attend(ctx, work context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, databaseTimeout)
	defer cancel()
	if _, err := r.db.Exec(ctx, aliveSQL, r.owner, 2*r.config.Lease, r.problem()); err != nil {
		return err
	}
	rows, err := r.db.Query(ctx, viewSQL)
	if err != nil {
		return err
	}
	view, err := pgx.CollectRows(rows, pgx.RowToStructByPos[shardView])
	switch {
	case err != nil:
		return err
	case len(view) == 0:
		return errors.New("outbox_cursor has no shard to read")
	case slices.ContainsFunc(view, func(shard shardView) bool { return !shard.Native }):
		return ErrForeignCluster
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.view = view
	for shard, held := range r.leases {
		if held.isOver() {
			delete(r.leases, shard)
		}
	}
	take, give := share(view, r.owner)
	for _, shard := range view {
		// A shard that the database assigns to this relay, but that the relay does not serve, was lost in a failover.
		if r.leases[shard.Shard] == nil && (shard.Holder == r.owner || slices.Contains(take, shard.Shard)) {
			r.leases[shard.Shard] = r.begin(work, shard.Shard)
		}
	}
	if held := r.leases[give]; held != nil {
		held.end()
	}
	return nil
}

const leaveSQL = `DELETE FROM outbox_relay WHERE owner = $1 OR NOT clock_within(expires_at, interval '1 day')`

// leave removes this relay from the list of live relays.
func (r *Relay) leave(ctx context.Context) {
	err := shortly(ctx, func(ctx context.Context) error {
		_, err := r.db.Exec(ctx, leaveSQL, r.owner)
		return err
	})
	if err != nil {
		slog.WarnContext(ctx, "relay stays listed as alive until its entry expires", "error", err)
	}
}

func (r *Relay) waitForLeases() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, held := range r.leases {
		<-held.over
	}
}

// shardView describes a shard that can be read.
type shardView struct {
	Shard  int16
	Native bool     // the cursor belongs to this cluster
	Holder string   // the owner of the lease, "" if none
	Relays []string // the live relays
}

const none = -1

// share returns which shards to take and which one to give up. A relay takes free shards up to its share, rounded up.
// It gives up a shard if another relay has at least two fewer. So eventually no relay has more than one shard more
// than another.
func share(view []shardView, me string) (take []int16, give int16) {
	give = none
	if len(view) == 0 {
		return nil, give
	}
	holds := map[string]int{me: 0} // a starved relay's registration may expire before it reads the view
	for _, relay := range view[0].Relays {
		holds[relay] = 0
	}
	var last int16 = none
	for _, shard := range view {
		if _, alive := holds[shard.Holder]; alive {
			holds[shard.Holder]++
		}
		if shard.Holder == me {
			last = shard.Shard
		}
	}
	mine, least := holds[me], len(view)
	for relay, n := range holds {
		if relay != me {
			least = min(least, n)
		}
	}
	if len(holds) > 1 && mine-least >= 2 {
		return nil, last
	}
	for _, shard := range view {
		if shard.Holder == "" && mine+len(take) < (len(view)+len(holds)-1)/len(holds) {
			take = append(take, shard.Shard)
		}
	}
	return take, give
}

// wait returns when the bell rings, the timeout expires or ctx is done.
func wait(ctx context.Context, bell LocalBell, timeout time.Duration) {
	timer := time.NewTimer(timeout)
	defer timer.Stop()
	select {
	case <-ctx.Done():
	case <-bell:
	case <-timer.C:
	}
}

// MaxInFlight returns the maximum number of unconfirmed messages of one shard. The publisher must have room for them.
func (c Config) MaxInFlight() int { return maxInFlight * c.withDefaults().PageRows }

const sweepInterval = time.Minute

// sweepPeriodically empties expired slots every sweepInterval until ctx is done.
func (r *Relay) sweepPeriodically(ctx context.Context) {
	for ctx.Err() == nil {
		emptied, err := sweep(ctx, r.db, r.config.Retention)
		if err != nil && ctx.Err() == nil {
			slog.WarnContext(ctx, "outbox not swept, it grows until a sweep succeeds", "error", err)
		}
		if len(emptied) > 0 {
			slog.InfoContext(ctx, "outbox swept", "slots", emptied)
		}
		wait(ctx, nil, sweepInterval)
	}
}

// sweep empties the slots of the log in which every message is delivered and older than retention, and returns them. A
// slot with an undelivered message stays, however old it is.
func sweep(ctx context.Context, db *pgxpool.Pool, retention time.Duration) (slots []int16, err error) {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	err = postgres.Transact(ctx, db, func(tx pgx.Tx) error { // sets the isolation level
		return tx.QueryRow(ctx, `SELECT outbox_sweep($1)`, retention).Scan(&slots)
	})
	return slots, err
}
