package app

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"example.com/shop/internal/dev/testenv"
	"example.com/shop/internal/inbox"
	"example.com/shop/internal/ops"
	"example.com/shop/internal/postgres"
)

// A relay that keeps messages for longer than the inbox detects copies, and a consumer of such an outbox, refuse to
// run.
func TestWhoWouldForgetTooEarlyRefusesToRun(t *testing.T) {
	t.Parallel()
	config := probed(Config{PostgresURL: testenv.PostgresURL(t), AMQPURL: testenv.AMQP(t), Addr: "127.0.0.1:0"})
	db, err := postgres.Open(t.Context(), postgres.Config{URL: config.PostgresURL})
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	_, err = db.Exec(t.Context(), `CREATE OR REPLACE FUNCTION outbox_slot_length() RETURNS interval
		LANGUAGE sql IMMUTABLE RETURN interval '32 hours'`)
	if err != nil {
		t.Fatal(err)
	}
	for name, process := range map[string]struct {
		run  func(context.Context, Config) error
		role string
	}{"Relay": {RunRelay, "shop_relay"}, "Consumer": {RunConsumer, "shop_consumer"}, "All": {RunAll, "shop_all"}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			config := config
			config.PostgresURL = testenv.As(t, config.PostgresURL, process.role)
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			defer cancel()
			err := process.run(ctx, config)
			if !errors.Is(err, ops.ErrForgetful) || strings.Contains(err.Error(), "\n") ||
				!strings.Contains(err.Error(), "6d16h") {
				t.Errorf("error is %v", err)
			}
		})
	}
	t.Run("API", func(t *testing.T) { // uses neither
		await(t, "API", serve(t, RunAPI, config), 200)
	})
}

// If rows were moved without their sequences, relay and consumer refuse to run before the repair.
func TestMovedRowsWithoutTheirSequences(t *testing.T) {
	t.Parallel()
	config := probed(Config{PostgresURL: testenv.PostgresURL(t), AMQPURL: testenv.AMQP(t), Addr: "127.0.0.1:0"})
	db, err := postgres.Open(t.Context(), postgres.Config{URL: config.PostgresURL})
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	_, err = db.Exec(t.Context(), `
		INSERT INTO inbox_retry (consumer, message_id, type, key, payload, headers, attempts, due_at, last_error)
		SELECT 'c', n, '', 'k', '', '{}', 1, 'infinity', '' FROM generate_series(1, 3) AS n;
		ALTER SEQUENCE inbox_retry_seq_seq RESTART`)
	if err != nil {
		t.Fatal(err)
	}
	for role, run := range map[string]func(context.Context, Config) error{
		"shop_relay": RunRelay, "shop_consumer": RunConsumer,
	} {
		config := config
		config.PostgresURL = testenv.As(t, config.PostgresURL, role)
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		err := run(ctx, config)
		cancel()
		if !errors.Is(err, ops.ErrBehind) || !strings.Contains(err.Error(), "inbox_retry.seq continues from 0, but ") {
			t.Errorf("%s: %v", role, err)
		}
	}
	if _, err := ops.Repair(t.Context(), db); err != nil {
		t.Fatal(err)
	}
	config.PostgresURL = testenv.As(t, config.PostgresURL, "shop_consumer")
	await(t, "consumer", serve(t, RunConsumer, config), 200)
}

// A process whose clock differs from the database's is not ready, before Postgres refuses its messages.
func TestAWrongClockIsNotReady(t *testing.T) {
	t.Parallel()
	config := probed(Config{PostgresURL: testenv.PostgresURL(t), Addr: "127.0.0.1:0"})
	db, err := postgres.Open(t.Context(), postgres.Config{URL: config.PostgresURL})
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	testenv.ShiftClock(t, db, -11*time.Minute)
	await(t, "API", serve(t, RunAPI, config), 503)
}

func TestLongestRedelivery(t *testing.T) {
	t.Parallel()
	if longest := longestRedelivery(); longest < 10*time.Hour+45*time.Minute || longest > 12*time.Hour {
		t.Errorf("got %s", longest)
	}
	// Two attempts: the first run, four claims of 3 + 5 s with a poll of 1 s each, and a pause of at most 2 s plus a
	// quarter.
	short := inbox.Config{
		MaxAttempts: 2, HandlerTimeout: 3 * time.Second, RetryBase: 4 * time.Second, RetryMax: 2 * time.Second,
	}
	if got, want := short.LongestRetry(), 3*time.Second+4*9*time.Second+2500*time.Millisecond; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}
