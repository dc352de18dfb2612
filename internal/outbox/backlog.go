package outbox

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync/atomic"
	"time"

	"example.com/shop/internal/postgres"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/metric"
)

// Backlog describes the undelivered messages of one shard.
type Backlog struct {
	Shard    int16
	Messages int64
	// Age is the age of the oldest message, or 0 if there is none.
	Age time.Duration
}

const measureSQL = `
SELECT shard, messages, coalesce(clock_age(oldest_at), interval '0') FROM outbox_measure($1)`

// Measure returns the backlog of each shard. It returns the last count if that is not older than stale, and counts anew
// otherwise.
func Measure(ctx context.Context, db *pgxpool.Pool, stale time.Duration) ([]Backlog, error) {
	var found []Backlog
	err := postgres.Transact(ctx, db, func(tx pgx.Tx) error { // because it takes a lock
		rows, err := tx.Query(ctx, measureSQL, stale)
		if err == nil {
			found, err = pgx.CollectRows(rows, pgx.RowToStructByPos[Backlog])
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("measure backlog: %w", err)
	}
	return found, nil
}

// measureInterval is how often the relay counts the backlog. A count costs little while the backlog is small; the relay
// counts a large one less often.
const measureInterval = time.Second

// measure keeps the count fresh until ctx is done.
func (r *Relay) measure(ctx context.Context) {
	for ctx.Err() == nil {
		began := time.Now()
		found, err := Measure(ctx, r.db, measureInterval*9/10)
		if err == nil {
			r.backlog.set(found)
		} else if ctx.Err() == nil {
			slog.DebugContext(ctx, "backlog not measured", "error", err)
		}
		wait(ctx, nil, max(measureInterval, 20*time.Since(began)))
	}
}

// Gate limits the backlog while the broker is down: above the high-water mark, it refuses transactions that would
// insert messages before they begin.
type Gate struct {
	db     *pgxpool.Pool
	config GateConfig
	why    atomic.Pointer[string]

	backlog measured
	refused metric.Int64Counter
}

// GateConfig sets the high-water mark. A limit of 0 means no limit.
type GateConfig struct {
	MaxMessages int64
	MaxAge      time.Duration
	// MeterProvider receives the metrics. Default: the global one.
	MeterProvider metric.MeterProvider
}

// ErrBacklogFull means that too many messages wait for the broker, and that nothing was written.
var ErrBacklogFull = errors.New("outbox backlog is full")

// NewGate returns an open Gate. The Gate follows the backlog while Run runs.
func NewGate(db *pgxpool.Pool, config GateConfig) *Gate {
	if config.MeterProvider == nil {
		config.MeterProvider = otel.GetMeterProvider()
	}
	g := &Gate{db: db, config: config}
	meter := config.MeterProvider.Meter(scope)
	var errs [3]error
	g.refused, errs[0] = meter.Int64Counter("outbox.gate.refused", metric.WithUnit("{transaction}"),
		metric.WithDescription("Transactions refused because the backlog was above the high-water mark."))
	_, errs[1] = meter.Int64ObservableGauge("outbox.gate.refusing",
		metric.WithDescription("1 while the backlog is above the high-water mark, else 0."),
		metric.WithInt64Callback(func(_ context.Context, o metric.Int64Observer) error {
			var refusing int64
			if g.closed() {
				refusing = 1
			}
			o.Observe(refusing)
			return nil
		}))
	errs[2] = g.backlog.observe(meter) // the relay reports it too, but operators need it most when no relay runs
	report(errors.Join(errs[:]...))
	g.refused.Add(context.Background(), 0)
	return g
}

// Check returns ErrBacklogFull above the high-water mark. It costs no query.
func (g *Gate) Check() error {
	if g == nil {
		return nil
	}
	if why := g.why.Load(); why != nil {
		g.refused.Add(context.Background(), 1)
		return fmt.Errorf("%w: %s", ErrBacklogFull, *why)
	}
	return nil
}

// closed reports whether Check would return an error. It counts nothing.
func (g *Gate) closed() bool { return g != nil && g.why.Load() != nil }

// gateStale is how old the relay's count may be before the gate counts the backlog itself. When no relay runs, the
// backlog grows most.
const gateStale = 5 * time.Second

// Run reads the backlog's count, which the relay usually makes, every second until ctx is done. If the database does
// not answer, the gate stays as it is.
func (g *Gate) Run(ctx context.Context) {
	for ctx.Err() == nil {
		found, err := Measure(ctx, g.db, gateStale)
		switch {
		case err == nil:
			g.backlog.set(found)
			g.judge(ctx, found)
		case ctx.Err() == nil:
			slog.DebugContext(ctx, "backlog not known", "error", err)
		}
		wait(ctx, nil, measureInterval)
	}
}

func (g *Gate) judge(ctx context.Context, found []Backlog) {
	var messages int64
	var age time.Duration
	for _, shard := range found {
		messages, age = messages+shard.Messages, max(age, shard.Age)
	}
	var why string
	switch {
	case g.config.MaxMessages > 0 && messages >= g.config.MaxMessages:
		why = fmt.Sprintf("%d messages wait for the broker, the limit is %d", messages, g.config.MaxMessages)
	case g.config.MaxAge > 0 && age >= g.config.MaxAge:
		why = fmt.Sprintf("the oldest message has waited for the broker for %s, the limit is %s",
			age.Round(time.Second), g.config.MaxAge)
	}
	was := g.closed()
	if why == "" {
		g.why.Store(nil)
	} else {
		g.why.Store(&why)
	}
	if is := why != ""; is != was {
		slog.WarnContext(ctx, "backpressure changed", "refusing", is, "messages", messages, "age", age)
	}
}
