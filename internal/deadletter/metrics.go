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

// countOpenSQL shows a reporting process, the relay, how many dead letters there are and why, but not their contents.
const countOpenSQL = `
SELECT consumer, reason, count(*) FROM dead_letter WHERE resolution IS NULL GROUP BY consumer, reason`

type open struct {
	Consumer string
	Reason   Reason
	Letters  int64
}

// ObserveOpen reports the unresolved dead letters, by consumer ("" for those that the relay parked) and reason.
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
			return nil // Sample has logged it, and the other metrics are still useful
		}
		if len(found) == 0 {
			o.ObserveInt64(gauge, 0)
		}
		for _, group := range found {
			o.ObserveInt64(gauge, group.Letters, metric.WithAttributes(
				attribute.String("consumer", group.Consumer), attribute.String("reason", string(group.Reason))))
		}
		return nil
	}, gauge)
	return errors.Join(err, err2)
}
