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

// Config sets up a Relay; the zero value is fit for production.
type Config struct {
	// PageRows is the most messages of one page. Two pages are in flight at most, so a crash of the relay repeats up to
	// twice as many. Default 1000: with two such pages in flight RabbitMQ, not the relay, is the limit; half of that costs
	// a tenth of the rate.
	PageRows int
	// PageBytes is the most payload bytes of one page, and with it bounds the relay's memory. Default 4 MiB.
	PageBytes int
	// Lease is how long a relay that went silent keeps its shards, by the database's clock. Another one takes over within
	// twice that. Default 5 s.
	Lease time.Duration
	// PollInterval is the longest time between two looks at the log when no doorbell rings. Default 1 s.
	PollInterval time.Duration
	// Retention is how long delivered messages stay in the log at least, to be looked at and replayed. Default 24 h.
	Retention time.Duration
	// MeterProvider takes the metrics. Default: the global one.
	MeterProvider metric.MeterProvider
	// TracerProvider takes a span for each message that is published, if its trace is recorded. Default: none.
	TracerProvider trace.TracerProvider
}

// MaxRetention is the longest Retention: the ring of slots comes round after 40 hours, and one slot of eight hours is
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

// Relay publishes the log, each shard in order. Any number of relays may run: they share the shards out among them, and
// each shard is published by the one that holds its lease.
type Relay struct {
	db           *pgxpool.Pool
	newPublisher func() messaging.Publisher
	owner        string
	config       Config
	attention    LocalBell // rung when there may be a shard to take

	meters  meters
	spans   spanMaker
	backlog measured

	mu     sync.Mutex
	leases map[int16]*lease
	view   []shardView // as last seen
}

// NewRelay makes a Relay. Each shard that it holds is published through a publisher of its own.
func NewRelay(db *pgxpool.Pool, newPublisher func() messaging.Publisher, config Config) *Relay {
	host, _ := os.Hostname()
	r := &Relay{
		db: db, newPublisher: newPublisher, config: config.withDefaults(), attention: NewLocalBell(),
		leases: map[int16]*lease{},
		owner:  fmt.Sprintf("%s/%d/%s", host, os.Getpid(), uuid.NewString()[:8]),
	}
	r.meters, r.spans = r.newMeters(), newSpanMaker(r.config.TracerProvider)
	return r
}

// Ring makes the relay look at the log now. It is the Bell for writers in the same process.
func (r *Relay) Ring() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, held := range r.leases {
		held.wake.Ring()
	}
}

// Listen hears the doorbells of other processes until ctx is done, on a direct connection to url. A relay that does not
// listen polls.
func (r *Relay) Listen(ctx context.Context, url string) {
	session.Listen(ctx, url, Channel, func(payload string) {
		if payload == leaseNews {
			r.attention.Ring()
		} else {
			r.Ring()
		}
	})
}

// Run publishes until ctx is done, then waits for what is in flight and gives the leases back. It goes on through every
// failure of the database and the broker; the only error it returns is ErrForeignCluster.
func (r *Relay) Run(ctx context.Context) error {
	work, cancel := context.WithCancel(context.WithoutCancel(ctx))
	var chores sync.WaitGroup
	chores.Go(func() { r.sweepNowAndThen(work) })
	chores.Go(func() { r.moveDue(work) })
	chores.Go(func() { r.measure(work) })
	defer func() {
		r.leave(ctx) // first, or those who hear of a free shard would leave it to us
		cancel()
		r.settleDown()
		chores.Wait()
	}()
	pause := newPause(r.config.PollInterval)
	for ctx.Err() == nil {
		next := r.config.Lease / 4 // so that a shard is taken soon after its lease has ended
		err := r.attend(ctx, work)
		switch {
		case errors.Is(err, ErrForeignCluster):
			return err
		case err != nil && ctx.Err() == nil:
			next = pause.NextBackOff()
			slog.WarnContext(ctx, "relay has no view of the shards", "error", err, "retry_in", next)
		default:
			pause.Reset()
		}
		wait(ctx, r.attention, next)
	}
	return nil
}

// newPause spaces the tries after failures. What failed for one relay fails for all of them at once, hence the jitter.
func newPause(first time.Duration) *backoff.ExponentialBackOff {
	pause := backoff.NewExponentialBackOff()
	pause.InitialInterval = min(first, 100*time.Millisecond)
	pause.MaxInterval = 10 * time.Second
	return pause
}

// databaseTimeout ends statements that should be quick: a database that vanished without a word is given up, and looked
// for anew.
const databaseTimeout = 10 * time.Second

const aliveSQL = `
INSERT INTO outbox_relay (owner, expires_at, lease, problem) VALUES ($1, clock_timestamp() + $2, $2, $3)
ON CONFLICT (owner) DO UPDATE SET expires_at = excluded.expires_at, lease = excluded.lease, problem = excluded.problem`

const viewSQL = `
SELECT shard, ` + nativeSQL + `, CASE WHEN clock_holds(lease_expires_at, lease) THEN owner ELSE '' END AS holder,
    (SELECT array_agg(owner) FROM outbox_relay WHERE clock_holds(expires_at, lease)) AS relays
FROM outbox_cursor WHERE ` + readableSQL + `
ORDER BY shard`

// attend says that this relay is alive, takes shards if it has less than its share, and gives one up if another relay
// has too little.
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
	case slices.ContainsFunc(view, func(one shardView) bool { return !one.Native }):
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
	for _, one := range view {
		// What is ours by the book and not served is what we lost by a failover.
		if r.leases[one.Shard] == nil && (one.Holder == r.owner || slices.Contains(take, one.Shard)) {
			r.leases[one.Shard] = r.begin(work, one.Shard)
		}
	}
	if held := r.leases[give]; held != nil {
		held.end()
	}
	return nil
}

// leave takes this relay from the list of those alive.
func (r *Relay) leave(ctx context.Context) {
	err := shortly(ctx, func(ctx context.Context) error {
		_, err := r.db.Exec(ctx,
			`DELETE FROM outbox_relay WHERE owner = $1 OR NOT clock_within(expires_at, interval '1 day')`, r.owner)
		return err
	})
	if err != nil {
		slog.WarnContext(ctx, "relay stays listed as alive until its time ends", "error", err)
	}
}

func (r *Relay) settleDown() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, held := range r.leases {
		<-held.over
	}
}

// shardView is a shard that can be read, whether its cursor belongs to this cluster, who holds it ("" for nobody), and
// which relays are alive.
type shardView struct {
	Shard  int16
	Native bool
	Holder string
	Relays []string
}

const none = -1

// share works out which shards to take and which one to give up. A relay takes what is free up to its share, rounded
// up; and it gives one up to a relay that has at least two less. So in the end nobody has more than one shard more than
// another.
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
	for _, one := range view {
		if _, alive := holds[one.Holder]; alive {
			holds[one.Holder]++
		}
		if one.Holder == me {
			last = one.Shard
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
	for _, one := range view {
		if one.Holder == "" && mine+len(take) < (len(view)+len(holds)-1)/len(holds) {
			take = append(take, one.Shard)
		}
	}
	return take, give
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

// MaxInFlight returns the largest number of unconfirmed messages of one shard. The publisher must have room for them.
func (c Config) MaxInFlight() int { return maxInFlight * c.withDefaults().PageRows }

const sweepInterval = time.Minute

// sweepNowAndThen empties the slots whose time is over.
func (r *Relay) sweepNowAndThen(ctx context.Context) {
	for ctx.Err() == nil {
		emptied, err := sweep(ctx, r.db, r.config.Retention)
		if err != nil && ctx.Err() == nil {
			slog.WarnContext(ctx, "outbox not swept, it grows until it is", "error", err)
		}
		if len(emptied) > 0 {
			slog.InfoContext(ctx, "outbox swept", "slots", emptied)
		}
		wait(ctx, nil, sweepInterval)
	}
}

// sweep empties the slots of the log in which everything is delivered and older than retention, and returns them. A
// slot that holds something undelivered stays, however old it is.
func sweep(ctx context.Context, db *pgxpool.Pool, retention time.Duration) (slots []int16, err error) {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	err = postgres.Transact(ctx, db, func(tx pgx.Tx) error { // for its isolation level
		return tx.QueryRow(ctx, `SELECT outbox_sweep($1)`, retention).Scan(&slots)
	})
	return slots, err
}
