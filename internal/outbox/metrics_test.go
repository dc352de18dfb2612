package outbox

import (
	"errors"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"example.com/shop/internal/dev/testenv"
	"example.com/shop/internal/messaging"
	sdk "go.opentelemetry.io/otel/sdk/metric"
)

// Every metric changes when its event happens.
func TestMetrics(t *testing.T) {
	t.Parallel()
	db := testenv.Postgres(t)
	for _, text := range numbered(4) {
		insert(t, db, "", text)
	}
	exec(t, db, `UPDATE outbox SET created_at = created_at - interval '1 minute'`)
	if _, _, err := acquire(t.Context(), db, 0, "killed", time.Second); err != nil { // the relay steals this lease
		t.Fatal(err)
	}
	reader := sdk.NewManualReader()
	b := newBroker(0)
	tries, down := map[string]int{}, true
	b.onPage = func([]string) error {
		if down {
			return errors.New("broker down")
		}
		return nil
	}
	b.verdict = func(text string, _ []string) error {
		switch tries[text]++; {
		case text == "m001":
			return messaging.ErrReturned
		case text == "m002" && tries[text] == 1:
			return messaging.ErrNacked
		case text == "m003" && tries[text] == 2: // the first verdict is ignored: it follows the nacked message
			return messaging.ErrUnknown
		}
		return nil
	}
	start(t, db, b, Config{
		Lease: time.Second, PollInterval: 10 * time.Millisecond,
		MeterProvider: sdk.NewMeterProvider(sdk.WithReader(reader)),
	})
	await := func(want map[string]float64) {
		t.Helper()
		testenv.Eventually(t, 20*time.Second, func() error {
			got := testenv.Metrics(t, reader)
			for name, least := range want {
				if value, there := got[name]; !there || value < least || least == 0 && value != 0 {
					return fmt.Errorf("%s is %v, want %v; all: %v", name, value, least, got)
				}
			}
			return nil
		})
	}
	await(map[string]float64{
		"outbox.backlog{0}": 4, "outbox.lag{0}": 60, "outbox.lease.held{0}": 1, "outbox.lease.steals{}": 1,
	})
	b.mu.Lock()
	down = false
	b.mu.Unlock()
	await(map[string]float64{
		"outbox.backlog{0}": 0, "outbox.lag{0}": 0, "outbox.published{}": 3, "outbox.returned{}": 1,
		"outbox.nacked{}": 1, "outbox.unknown{}": 1, "outbox.parked{unroutable}": 1,
		"outbox.confirm.duration{}": 3, "outbox.page.messages{}": 3,
	})
	equal(t, "published", testenv.Metrics(t, reader)["outbox.published{}"], 3.0)
}

// While the database does not answer, the lag of a backlog keeps growing, and the lag of an empty shard stays 0.
func TestLagGrowsBetweenMeasurements(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		reader := sdk.NewManualReader()
		var m measured
		if err := m.observe(sdk.NewMeterProvider(sdk.WithReader(reader)).Meter("test")); err != nil {
			t.Fatal(err)
		}
		equal(t, "before the first measurement", len(testenv.Metrics(t, reader)), 0)
		m.set([]Backlog{{Shard: 0, Messages: 1, Age: time.Second}, {Shard: 1}})
		time.Sleep(time.Minute)
		metrics := testenv.Metrics(t, reader)
		equal(t, "lag of what waits", metrics["outbox.lag{0}"], 61.0)
		equal(t, "lag of nothing", metrics["outbox.lag{1}"], 0.0)
	})
}
