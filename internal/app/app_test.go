package app

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"sync"
	"testing"
	"time"

	"example.com/orders/internal/testenv"
)

func TestMain(m *testing.M) { testenv.Main(m) }

// serve runs a process until the test ends, and returns what its /readyz answers.
func serve(t *testing.T, run func(context.Context, Config) error, config Config) (ready func() int) {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	config.Addr = listener.Addr().String()
	if err := listener.Close(); err != nil { // the process wants it now
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() {
		if err := run(ctx, config); err != nil {
			t.Error(err)
		}
	})
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	t.Cleanup(func() { cancel(); running.Wait() })
	return func() int {
		response, err := client.Get("http://" + config.Addr + "/readyz")
		if err != nil {
			return 0
		}
		defer response.Body.Close()
		return response.StatusCode
	}
}

func await(t *testing.T, what string, ready func() int, want int) {
	t.Helper()
	testenv.Eventually(t, 20*time.Second, func() error {
		if got := ready(); got != want {
			return fmt.Errorf("%s: /readyz answers %d, want %d", what, got, want)
		}
		return nil
	})
}

// Each process is ready while what it needs is there: all need the database, and all but the API need the broker.
func TestReadiness(t *testing.T) {
	t.Parallel()
	for name, process := range map[string]struct {
		run         func(context.Context, Config) error
		needsBroker bool
	}{
		"API": {RunAPI, false}, "Relay": {RunRelay, true}, "Consumer": {RunConsumer, true}, "All": {RunAll, true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			database, postgresURL := testenv.ProxyURL(t, testenv.PostgresURL(t))
			broker, amqpURL := testenv.ProxyURL(t, testenv.AMQP(t))
			ready := serve(t, process.run, Config{PostgresURL: postgresURL, AMQPURL: amqpURL, Exchange: "events"})
			await(t, "at first", ready, http.StatusOK)

			broker.Refuse(true)
			broker.Cut()
			if process.needsBroker {
				await(t, "without the broker", ready, http.StatusServiceUnavailable)
			} else if got := ready(); got != http.StatusOK {
				t.Errorf("without the broker, which it does not need: %d", got)
			}
			broker.Refuse(false)
			await(t, "with the broker back", ready, http.StatusOK)

			database.Refuse(true)
			database.Cut()
			await(t, "without the database", ready, http.StatusServiceUnavailable)
			database.Refuse(false)
			await(t, "with the database back", ready, http.StatusOK)
		})
	}
}

func TestAnAddressThatIsTakenEndsTheProcess(t *testing.T) {
	t.Parallel()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	config := Config{PostgresURL: testenv.PostgresURL(t), AMQPURL: testenv.AMQP(t), Exchange: "events", Addr: listener.Addr().String()}
	done := make(chan error, 1)
	go func() { done <- RunAll(t.Context(), config) }()
	select {
	case err := <-done:
		var taken *net.OpError
		if !errors.As(err, &taken) {
			t.Errorf("error is %v", err)
		}
	case <-time.After(30 * time.Second):
		t.Error("still running")
	}
}
