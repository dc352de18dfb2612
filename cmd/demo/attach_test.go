//go:build unix

package main

import (
	"context"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"example.com/shop/internal/app"
	"example.com/shop/internal/dev/testenv"
	"github.com/jackc/pgx/v5"
)

func TestMain(m *testing.M) { testenv.Main(m) }

// service runs the whole service until the test ends, and returns the URL of its API.
func service(t *testing.T, postgresURL, amqpURL string) (url string) {
	t.Helper()
	addr, opsAddr := testenv.FreeAddress(t), testenv.FreeAddress(t)
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() {
		config := app.Config{
			PostgresURL: postgresURL, AMQPURL: amqpURL, Exchange: exchange, Addr: addr, OpsAddr: opsAddr,
			Edge: app.Edge{NoAuth: true},
		}
		if err := app.RunAll(ctx, config); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(func() { cancel(); running.Wait() })
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	testenv.Eventually(t, 20*time.Second, func() error {
		response, err := client.Get("http://" + opsAddr + "/readyz")
		if err != nil {
			return err
		}
		defer response.Body.Close()
		if response.StatusCode != http.StatusOK {
			return fmt.Errorf("/readyz returned %s", response.Status)
		}
		return nil
	})
	return "http://" + addr
}

// The load on a running service balances despite other orders and messages, but not if one of its own effects is wrong.
func TestAttach(t *testing.T) {
	t.Parallel()
	flags := cli{PostgresURL: testenv.PostgresURL(t), AMQPURL: testenv.AMQP(t), Orders: 100, Rate: 200}
	flags.Attach = service(t, flags.PostgresURL, flags.AMQPURL)
	db, err := pgx.Connect(t.Context(), flags.PostgresURL)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close(context.Background()) })
	play := func() (bool, string) {
		out, err := os.Create(filepath.Join(t.TempDir(), "out"))
		if err != nil {
			t.Fatal(err)
		}
		defer out.Close()
		balanced, err := attach(t.Context(), flags, newScreen(out))
		if err != nil {
			t.Fatal(err)
		}
		text, err := os.ReadFile(out.Name())
		if err != nil {
			t.Fatal(err)
		}
		return balanced, string(text)
	}
	mustExec := func(sql string) {
		if _, err := db.Exec(t.Context(), sql); err != nil {
			t.Fatal(err)
		}
	}

	// An order and a dead letter that are not part of the load.
	mustExec(`INSERT INTO orders (id, customer_id) VALUES (gen_random_uuid(), 'another')`)
	mustExec(`INSERT INTO dead_letter (consumer, message_id, type, key, payload, headers, reason, error, attempts)
		VALUES ('', 'm', 'another.v1.Event', 'another', '', '{}', 'test', '', 1)`)
	for range 2 {
		if balanced, text := play(); !balanced || !strings.Contains(text, "  placed                     100  ✓") {
			t.Fatalf("the ledger does not balance:\n%s", text)
		}
	}

	mustExec(`CREATE FUNCTION twice() RETURNS trigger LANGUAGE plpgsql AS $$
		BEGIN
			INSERT INTO notifications (order_id, kind, customer_id) VALUES (NEW.order_id, NEW.kind, NEW.customer_id);
			RETURN NULL;
		END $$`)
	mustExec(`CREATE TRIGGER twice AFTER INSERT ON notifications
		FOR EACH ROW WHEN (pg_trigger_depth() = 0) EXECUTE FUNCTION twice()`)
	if balanced, text := play(); balanced || !strings.Contains(text, "orders that were notified twice") {
		t.Errorf("the ledger misses that each order was notified twice:\n%s", text)
	}
}
