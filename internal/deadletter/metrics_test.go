package deadletter

import (
	"maps"
	"testing"

	"example.com/shop/internal/dev/testenv"
	"example.com/shop/internal/postgres"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
)

// ObserveOpen counts open dead letters and not resolved ones, with the rights of the relay.
func TestObserveOpen(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		letters  []Letter
		resolved int64
		want     map[string]float64
	}{
		"none": {nil, 0, map[string]float64{"dead_letters.open{}": 0}},
		"open": {
			[]Letter{{Consumer: "g", Reason: Permanent}, {Consumer: "g", Reason: Permanent}, {Reason: Unroutable}}, 0,
			map[string]float64{"dead_letters.open{gpermanent}": 2, "dead_letters.open{unroutable}": 1},
		},
		"resolved": {
			[]Letter{{Consumer: "g", Reason: Permanent}, {Reason: Unroutable}}, 1,
			map[string]float64{"dead_letters.open{unroutable}": 1},
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			url := testenv.PostgresURL(t)
			db := pool(t, url)
			err := postgres.Transact(t.Context(), db, func(tx pgx.Tx) error {
				if err := Insert(t.Context(), tx, test.letters...); err != nil || test.resolved == 0 {
					return err
				}
				return resolve(t, tx, test.resolved, Discarded, Note{Reason: "test", Actor: "test"})
			})
			if err != nil {
				t.Fatal(err)
			}
			reader := sdkmetric.NewManualReader()
			provider := sdkmetric.NewMeterProvider(sdkmetric.WithReader(reader))
			if err := ObserveOpen(pool(t, testenv.As(t, url, "shop_relay")), provider); err != nil {
				t.Fatal(err)
			}
			got := testenv.Metrics(t, reader)
			if !maps.Equal(got, test.want) {
				t.Errorf("got %v, want %v", got, test.want)
			}
		})
	}
}

func pool(t *testing.T, url string) *pgxpool.Pool {
	t.Helper()
	db, err := postgres.Open(t.Context(), postgres.Config{URL: url})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(db.Close)
	return db
}
