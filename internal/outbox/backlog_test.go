package outbox

import (
	"context"
	"errors"
	"sync"
	"testing"
	"time"

	"example.com/shop/internal/dev/testenv"
	"github.com/jackc/pgx/v5"
	sdk "go.opentelemetry.io/otel/sdk/metric"
)

func TestMeasure(t *testing.T) {
	t.Parallel()
	db := testenv.Postgres(t)
	measured := func(stale time.Duration) Backlog {
		t.Helper()
		found, err := Measure(t.Context(), db, stale)
		if err != nil || len(found) != 1 {
			t.Fatalf("found %v, %v", found, err)
		}
		return found[0]
	}
	equal(t, "of an empty log", measured(0), Backlog{})
	slow := openTx(t, db)
	insertIn(t, slow, "", "slow")
	fillProbes(t, db, 25)
	equal(t, "messages, as counted before", measured(time.Hour).Messages, int64(0))
	equal(t, "messages", measured(0).Messages, int64(25))
	exec(t, db, `UPDATE outbox SET created_at = created_at - interval '1 minute' WHERE id = (SELECT min(id) FROM outbox)`)
	if age := measured(0).Age; age < time.Minute || age > 2*time.Minute {
		t.Errorf("age is %s", age)
	}
	// Part of a batch is delivered, and a transaction that was in progress at its base has committed.
	held, at, err := acquire(t.Context(), db, 0, "a", time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	r := newReader(db)
	r.at = at
	_, found := r.page(t)
	if err := held.move(t.Context(), progress{delivered: found.end}); err != nil {
		t.Fatal(err)
	}
	equal(t, "messages after the first page", measured(0).Messages, int64(15))
	commitTx(t, slow)
	equal(t, "messages with the late one", measured(0).Messages, int64(16))
	exec(t, db, `UPDATE outbox_cursor SET delivered = pg_current_snapshot(), batch = NULL`)
	equal(t, "at the end", measured(0), Backlog{})
}

func TestGate(t *testing.T) {
	t.Parallel()
	for name, config := range map[string]GateConfig{
		"ByMessages": {MaxMessages: 5},
		"ByAge":      {MaxAge: 30 * time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			db := testenv.Postgres(t)
			reader := sdk.NewManualReader()
			config.MeterProvider = sdk.NewMeterProvider(sdk.WithReader(reader))
			gate := NewGate(db, config)
			equal(t, "refusing at first", testenv.Metrics(t, reader)["outbox.gate.refusing{}"], 0.0)
			writer := NewWriter(db, nil, gate)
			write := func() error {
				return writer.Transact(t.Context(), func(tx pgx.Tx) error {
					return Insert(t.Context(), tx,
						probe("", "x"))
				})
			}
			for range 5 {
				if err := write(); err != nil {
					t.Fatal(err)
				}
			}
			exec(t, db, `UPDATE outbox SET created_at = created_at - interval '1 minute'`)
			// No relay runs, so only the gate counts, and it starts after all messages are inserted.
			ctx, cancel := context.WithCancel(t.Context())
			var running sync.WaitGroup
			running.Go(func() { gate.Run(ctx) })
			t.Cleanup(func() { cancel(); running.Wait() })
			testenv.Eventually(t, 20*time.Second, gateIs(gate, true))
			before := rowsOf(t, db)
			if err := write(); !errors.Is(err, ErrBacklogFull) {
				t.Errorf("error is %v", err)
			}
			equal(t, "rows", rowsOf(t, db), before)
			metrics := testenv.Metrics(t, reader)
			equal(t, "refusing", metrics["outbox.gate.refusing{}"], 1.0)
			equal(t, "refused", metrics["outbox.gate.refused{}"] > 0, true)
			equal(t, "backlog, though no relay runs", metrics["outbox.backlog{0}"], float64(before))
			equal(t, "lag, though no relay runs", metrics["outbox.lag{0}"] >= 60, true)
			stop := start(t, db, newBroker(0), Config{})
			testenv.Eventually(t, 20*time.Second, gateIs(gate, false))
			stop()
			equal(t, "refusing in the end", testenv.Metrics(t, reader)["outbox.gate.refusing{}"], 0.0)
			if err := write(); err != nil {
				t.Error(err)
			}
		})
	}
}

func gateIs(gate *Gate, closed bool) func() error {
	return func() error {
		if err := gate.Check(); errors.Is(err, ErrBacklogFull) != closed {
			return errors.New("not yet")
		}
		return nil
	}
}
