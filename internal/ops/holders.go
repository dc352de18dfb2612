package ops

import (
	"context"
	"errors"
	"fmt"
	"time"

	"example.com/shop/internal/postgres"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"
)

// Holder is something that keeps vacuum from removing dead rows: a session with an old snapshot or transaction, a
// prepared transaction, a replication slot, or a standby that reports its queries.
type Holder struct {
	// Kind is session, prepared, slot or standby.
	Kind string
	// Name identifies it: the application and process, the prepared transaction, or the slot.
	Name string
	// Seconds is its age; 0 for a slot or a standby, whose age Postgres does not record.
	Seconds float64
	// Transactions is how many transactions have begun since its oldest one.
	Transactions int64
}

// holdersSQL shows sessions of other users without their age, unless the role has the rights of pg_monitor. It ignores
// sessions of other databases, which do not hold back vacuum in this one.
const holdersSQL = `
SELECT 'session', coalesce(nullif(application_name, ''), backend_type, 'unknown') || '/' || pid,
    extract(epoch FROM clock_timestamp() - xact_start)::float8, age(coalesce(backend_xmin, backend_xid))::bigint
FROM pg_stat_activity
WHERE coalesce(backend_xmin, backend_xid) IS NOT NULL AND pid <> pg_backend_pid() AND xact_start IS NOT NULL
    AND datname = current_database()
UNION ALL
SELECT 'prepared', gid, extract(epoch FROM clock_timestamp() - prepared)::float8, age(transaction)::bigint
FROM pg_prepared_xacts WHERE database = current_database()
UNION ALL
SELECT 'slot', slot_name, 0, greatest(age(xmin), age(catalog_xmin))::bigint
FROM pg_replication_slots WHERE coalesce(xmin, catalog_xmin) IS NOT NULL
UNION ALL
SELECT 'standby', coalesce(nullif(application_name, ''), 'unknown') || '/' || pid, 0, age(backend_xmin)::bigint
FROM pg_stat_replication WHERE backend_xmin IS NOT NULL
ORDER BY 4 DESC, 3 DESC LIMIT 10`

// holders returns what holds back vacuum, oldest first.
func holders(ctx context.Context, db *pgxpool.Pool) ([]Holder, error) {
	rows, err := db.Query(ctx, holdersSQL)
	if err != nil {
		return nil, fmt.Errorf("find holders of vacuum: %w", postgres.Classify(err))
	}
	holders, err := pgx.CollectRows(rows, pgx.RowToStructByPos[Holder])
	if err != nil {
		return nil, fmt.Errorf("find holders of vacuum: %w", postgres.Classify(err))
	}
	return holders, nil
}

// nameHolders is the age from which metrics name a holder. Younger holders are ordinary traffic, and their names would
// make new time series with each scrape.
const nameHolders = 10 * time.Second

// ObserveHolders reports the oldest holder of each kind.
func ObserveHolders(db *pgxpool.Pool, provider metric.MeterProvider) error {
	read := func(ctx context.Context) ([]Holder, error) { return holders(ctx, db) }
	return observeHolders(&postgres.Sample[[]Holder]{Read: read}, provider)
}

func observeHolders(sample *postgres.Sample[[]Holder], provider metric.MeterProvider) error {
	meter := provider.Meter("example.com/shop/internal/ops")
	age, err1 := meter.Float64ObservableGauge("postgres.vacuum.held", metric.WithUnit("s"),
		metric.WithDescription("Age of the oldest snapshot or transaction that holds back vacuum, by kind and holder. "+
			"0 if there is none."))
	count, err2 := meter.Int64ObservableGauge("postgres.vacuum.held.transactions", metric.WithUnit("{transaction}"),
		metric.WithDescription("Transactions since the one that holds back vacuum, by kind and holder. "+
			"0 if there is none."))
	_, err3 := meter.RegisterCallback(func(ctx context.Context, o metric.Observer) error {
		holders, err := sample.Get(ctx)
		if err != nil {
			return nil //nolint:nilerr // Sample has logged it, and the other metrics are still useful
		}
		for _, kind := range []string{"session", "prepared", "slot", "standby"} {
			oldest := oldestOf(holders, kind)
			who := metric.WithAttributes(attribute.String("kind", kind), attribute.String("holder", oldest.Name))
			o.ObserveFloat64(age, oldest.Seconds, who)
			o.ObserveInt64(count, oldest.Transactions, who)
		}
		return nil
	}, age, count)
	return errors.Join(err1, err2, err3)
}

// oldestOf returns the oldest holder of a kind, without its name if it is young. Holders are sorted by their
// transactions.
func oldestOf(holders []Holder, kind string) Holder {
	for _, h := range holders {
		if h.Kind == kind {
			if temporary := kind == "session" || kind == "prepared"; temporary && h.Seconds < nameHolders.Seconds() {
				h.Name = ""
			}
			return h
		}
	}
	return Holder{}
}
