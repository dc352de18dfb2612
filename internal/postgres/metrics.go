package postgres

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"
)

const scope = "example.com/shop/internal/postgres"

// sampleAge is how old a Sample may be when a scrape reads it. With it, many scrapers cost no more than one.
const sampleAge = 5 * time.Second

// Sample caches the result of a query, so that metric scrapes do not overload the database.
type Sample[T any] struct {
	// Read queries the database. Its context expires after 2 s.
	Read func(ctx context.Context) (T, error)
	// MaxAge is how long the result, or the error, is cached. Default 5 s.
	MaxAge time.Duration

	mu    sync.Mutex
	at    time.Time
	value T
	err   error
}

// Get returns the cached result, or reads anew if that is too old. Concurrent callers wait for the same result.
func (s *Sample[T]) Get(ctx context.Context) (T, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	age := s.MaxAge
	if age == 0 {
		age = sampleAge
	}
	if s.at.IsZero() || time.Since(s.at) >= age {
		ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
		defer cancel()
		s.value, s.err = s.Read(ctx)
		s.at = time.Now()
		if s.err != nil { // log here, once per read, and not on each scrape
			slog.DebugContext(ctx, "metrics not read from the database", "error", s.err)
		}
	}
	return s.value, s.err
}

// ObservePool registers metrics of how full a pool is and how often callers wait for a connection.
func ObservePool(db *pgxpool.Pool, name string, provider metric.MeterProvider) error {
	meter := provider.Meter(scope)
	of := func(more ...attribute.KeyValue) metric.ObserveOption {
		return metric.WithAttributes(append(more, attribute.String("pool", name))...)
	}
	conns, err1 := meter.Int64ObservableGauge("postgres.pool.connections", metric.WithUnit("{connection}"),
		metric.WithDescription("Connections of a pool, by state."))
	limit, err2 := meter.Int64ObservableGauge("postgres.pool.limit", metric.WithUnit("{connection}"),
		metric.WithDescription("Maximum number of connections of a pool."))
	waits, err3 := meter.Int64ObservableCounter("postgres.pool.waits", metric.WithUnit("{acquire}"),
		metric.WithDescription("Times that a caller had to wait for a connection because none was idle."))
	waited, err4 := meter.Float64ObservableCounter("postgres.pool.waited", metric.WithUnit("s"),
		metric.WithDescription("Time spent waiting for connections."))
	_, err5 := meter.RegisterCallback(func(_ context.Context, o metric.Observer) error {
		stat := db.Stat()
		o.ObserveInt64(conns, int64(stat.AcquiredConns()), of(attribute.String("state", "used")))
		o.ObserveInt64(conns, int64(stat.IdleConns()), of(attribute.String("state", "idle")))
		o.ObserveInt64(conns, int64(stat.ConstructingConns()), of(attribute.String("state", "connecting")))
		o.ObserveInt64(limit, int64(stat.MaxConns()), of())
		o.ObserveInt64(waits, stat.EmptyAcquireCount(), of())
		o.ObserveFloat64(waited, stat.EmptyAcquireWaitTime().Seconds(), of())
		return nil
	}, conns, limit, waits, waited)
	return errors.Join(err1, err2, err3, err4, err5)
}
