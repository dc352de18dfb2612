package ops

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"example.com/shop/internal/dev/testenv"
	"example.com/shop/internal/postgres"
	"github.com/jackc/pgx/v5"
	sdk "go.opentelemetry.io/otel/sdk/metric"
)

// Sessions that hold back vacuum are found, with age and name.
func TestHoldersOfVacuumAreMeasured(t *testing.T) {
	t.Parallel()
	url := testenv.PostgresURL(t)
	db := openAt(t, url)
	f := &fixture{Pool: db}
	other := openAt(t, testenv.With(t, url, "application_name", "idle"))
	old, err := other.BeginTx(t.Context(), pgx.TxOptions{IsoLevel: pgx.RepeatableRead})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = old.Rollback(context.Background()) })
	if _, err := old.Exec(t.Context(), `SELECT 1`); err != nil { // takes its snapshot
		t.Fatal(err)
	}
	f.exec(t, `CREATE TABLE t (n integer)`)
	f.exec(t, `INSERT INTO t VALUES (1)`)
	var found []Holder
	testenv.Eventually(t, 20*time.Second, func() error { // until it is old enough
		found, err = holders(t.Context(), db)
		if err == nil && (len(found) == 0 || found[0].Kind != "session" || !strings.HasPrefix(found[0].Name, "idle/") ||
			found[0].Seconds < .1 || found[0].Transactions < 2) {
			err = fmt.Errorf("found %+v", found)
		}
		return err
	})

	reader := sdk.NewManualReader()
	sample := &postgres.Sample[[]Holder]{MaxAge: time.Nanosecond, Read: func(ctx context.Context) ([]Holder, error) {
		found, err := holders(ctx, db)
		for i := range found {
			found[i].Seconds *= 100 // makes it old
		}
		return found, err
	}}
	if err := observeHolders(sample, sdk.NewMeterProvider(sdk.WithReader(reader))); err != nil {
		t.Fatal(err)
	}
	name := fmt.Sprintf("{%ssession}", found[0].Name)
	metrics := testenv.Metrics(t, reader)
	if metrics["postgres.vacuum.held"+name] < 10 || metrics["postgres.vacuum.held.transactions"+name] < 2 {
		t.Errorf("metrics are %v", metrics)
	}
	if value, there := metrics["postgres.vacuum.held{prepared}"]; !there || value != 0 {
		t.Errorf("there is no prepared transaction, but the metrics are %v", metrics)
	}
	if err := old.Rollback(t.Context()); err != nil {
		t.Fatal(err)
	}
	testenv.Eventually(t, 20*time.Second, func() error {
		if value, there := testenv.Metrics(t, reader)["postgres.vacuum.held"+name]; there {
			return fmt.Errorf("still %v", value)
		}
		return nil
	})
}

// Names that change with each scrape would make a new time series each time.
func TestYoungHoldersAreNotNamed(t *testing.T) {
	t.Parallel()
	all := []Holder{{"slot", "s", 0, 9}, {"session", "young/1", 9, 5}, {"prepared", "old", 11, 3}}
	for kind, want := range map[string]string{"slot": "s", "session": "", "prepared": "old", "standby": ""} {
		if got := oldestOf(all, kind); got.Name != want {
			t.Errorf("%s is named %q", kind, got.Name)
		}
	}
}
