package app

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"connectrpc.com/connect/v2"
	"example.com/shop/internal/auth"
	"example.com/shop/internal/dev/testenv"
	"github.com/jackc/pgx/v5/pgxpool"
)

// awaitMissing waits until /readyz lists exactly these failed checks.
func awaitMissing(t *testing.T, url string, want ...string) {
	t.Helper()
	testenv.Eventually(t, 40*time.Second, func() error {
		response, err := web.Get(url + "/readyz")
		if err != nil {
			return err
		}
		defer response.Body.Close()
		var answer struct{ Missing []string }
		if err := json.NewDecoder(response.Body).Decode(&answer); err != nil {
			return err
		}
		if (response.StatusCode == http.StatusOK) != (len(want) == 0) || !slices.Equal(answer.Missing, want) {
			return fmt.Errorf("%s with %q missing, want %q", response.Status, answer.Missing, want)
		}
		return nil
	})
}

// A process stays ready while its calls use every connection because they wait for a lock, such as a migration's.
// Otherwise all replicas would become unready at once.
func TestReadyWhileCallsHoldAllConnections(t *testing.T) {
	t.Parallel()
	db := testenv.Postgres(t)
	var calls *pgxpool.Pool
	config := probed(Config{PostgresURL: testenv.As(t, db.Config().ConnString(), "shop_api"), MaxConns: 3})
	config.domain = func(d deps) (domain, error) {
		calls = d.db
		return domain{register: func(*connect.Server) {}}, nil
	}
	url := start(t, RunAPI, config).ops
	awaitMissing(t, url)
	// Lock even the table that the check of the schema reads.
	lock, err := db.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Rollback(context.WithoutCancel(t.Context()))
	if _, err := lock.Exec(t.Context(), `LOCK TABLE outbox, goose_core_version IN ACCESS EXCLUSIVE MODE`); err != nil {
		t.Fatal(err)
	}
	var waiting sync.WaitGroup
	ctx, cancel := context.WithCancel(t.Context())
	defer waiting.Wait()
	defer cancel()
	for range 20 {
		waiting.Go(func() {
			// Waits until the test ends.
			_, _ = calls.Exec(ctx, `INSERT INTO outbox_message (type, key, payload) VALUES ('t.T', 'k', '')`)
		})
	}
	testenv.Eventually(t, 20*time.Second, func() error {
		if free := calls.Stat().MaxConns() - calls.Stat().AcquiredConns(); free > 0 {
			return fmt.Errorf("%d connections are free", free)
		}
		return nil
	})
	// Wait until readiness has queried Postgres three times more.
	queries := map[time.Time]bool{}
	testenv.Eventually(t, 40*time.Second, func() error {
		response, err := web.Get(url + "/readyz")
		if err != nil {
			return err
		}
		response.Body.Close()
		if response.StatusCode != http.StatusOK {
			t.Fatalf("status while calls wait is %s", response.Status)
		}
		var at time.Time
		err = db.QueryRow(t.Context(), `SELECT query_start FROM pg_stat_activity WHERE application_name = $1`,
			ServiceName+" readiness of api").Scan(&at)
		if err != nil {
			return err
		}
		if queries[at] = true; len(queries) < 4 {
			return fmt.Errorf("%d queries", len(queries))
		}
		return nil
	})
}

// A flood of probes opens no connections to Postgres or the broker, even if the broker is down.
func TestAFloodOfProbesOpensNoConnections(t *testing.T) {
	t.Parallel()
	broker, amqpURL := testenv.ProxyURL(t, testenv.AMQP(t))
	database, postgresURL := testenv.ProxyURL(t, testenv.PostgresURL(t))
	url := start(t, RunRelay, probed(Config{PostgresURL: postgresURL, AMQPURL: amqpURL})).ops
	awaitMissing(t, url)
	flood := func() {
		t.Helper()
		var probes sync.WaitGroup
		for range 20 {
			probes.Go(func() {
				for range 50 {
					if response, err := web.Get(url + "/readyz"); err == nil {
						response.Body.Close()
					}
				}
			})
		}
		probes.Wait()
	}
	before := broker.Accepted() + database.Accepted()
	flood()
	// The relay may still open up to eight connections of its pool, and each check, one per second, at worst one more.
	if opened, most := broker.Accepted()+database.Accepted()-before, 12; opened > most {
		t.Errorf("1,000 probes opened %d connections, want at most %d", opened, most)
	}
	broker.Refuse(true)
	broker.Cut()
	awaitMissing(t, url, "broker")
	started := time.Now()
	before = broker.Accepted()
	flood()
	if opened, most := broker.Accepted()-before, 3*(2+int(time.Since(started)/time.Second)); opened > most {
		t.Errorf("1,000 probes tried to connect %d times, want at most %d", opened, most)
	}
}

// If tokens are the only credentials, a process is not ready before it has the issuer's keys. With other credentials
// it does not wait for them.
func TestNotReadyBeforeTheFirstKeys(t *testing.T) {
	t.Parallel()
	var available atomic.Bool
	issuer := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		if !available.Load() {
			w.WriteHeader(http.StatusServiceUnavailable)
			return
		}
		key := strings.Repeat("A", 43)
		_, _ = w.Write([]byte(`{"keys":[{"kty":"OKP","crv":"Ed25519","kid":"1","x":"` + key + `"}]}`))
	}))
	defer issuer.Close()
	tokens := Edge{JWKS: issuer.URL, Tokens: auth.TokenConfig{Issuer: "i", Audience: "a"}}
	both := tokens
	_, both.APIKeys = apiKeys(t, "customer")
	config := probed(Config{PostgresURL: testenv.PostgresURL(t), AMQPURL: testenv.AMQP(t)})
	config.Edge = both
	url := start(t, RunAPI, config).ops
	awaitMissing(t, url)
	config.Edge = tokens
	var urls []string
	for _, process := range processes {
		if process.takesCalls {
			urls = append(urls, start(t, process.run, config).ops)
			awaitMissing(t, urls[len(urls)-1], "jwks")
		}
	}
	available.Store(true)
	for _, url := range urls {
		awaitMissing(t, url)
	}
}
