package deadletter

import (
	"context"
	"errors"
	"fmt"

	"example.com/shop/internal/postgres"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"
)

// A process that reports, the relay, may see how many there are and why, and not what is in them.
const countOpenSQL = `SELECT consumer, reason, count(*) FROM dead_letter WHERE resolution IS NULL GROUP BY consumer, reason`

type open struct {
	Consumer string
	Reason   Reason
	Letters  int64
}

// ObserveOpen reports the letters that nobody has resolved, by consumer ("" for those that the relay parked) and
// reason.
func ObserveOpen(db *pgxpool.Pool, provider metric.MeterProvider) error {
	meter := provider.Meter("example.com/shop/internal/deadletter")
	gauge, err := meter.Int64ObservableGauge("dead_letters.open", metric.WithUnit("{message}"),
		metric.WithDescription("Dead letters that are neither redriven nor discarded."))
	sample := postgres.Sample[[]open]{Read: func(ctx context.Context) ([]open, error) {
		rows, err := db.Query(ctx, countOpenSQL)
		if err != nil {
			return nil, fmt.Errorf("count dead letters: %w", err)
		}
		return pgx.CollectRows(rows, pgx.RowToStructByPos[open])
	}}
	_, err2 := meter.RegisterCallback(func(ctx context.Context, o metric.Observer) error {
		found, err := sample.Get(ctx)
		if err != nil {
			return nil // Sample has said it; the rest of the metrics is worth having
		}
		if len(found) == 0 {
			o.ObserveInt64(gauge, 0)
		}
		for _, one := range found {
			o.ObserveInt64(gauge, one.Letters, metric.WithAttributes(attribute.String("consumer", one.Consumer),
				attribute.String("reason", string(one.Reason))))
		}
		return nil
	}, gauge)
	return errors.Join(err, err2)
}
