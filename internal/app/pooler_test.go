package app

import (
	"fmt"
	"net/http"
	"net/url"
	"testing"
	"time"

	"example.com/orders/internal/messaging"
	"example.com/orders/internal/outbox"
	"example.com/orders/internal/postgres"
	"example.com/orders/internal/testenv"
	"github.com/jackc/pgx/v5"
	"golang.org/x/sync/errgroup"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// Everything works through a pooler in transaction mode, with the doorbell on a direct connection or without a doorbell.
func TestThroughAPooler(t *testing.T) {
	t.Parallel()
	for name, listens := range map[string]bool{"Listening": true, "Polling": false} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			direct := as(t, testenv.PostgresURL(t), "app_all")
			pooled := testenv.PgBouncer(t, direct)
			config := Config{PostgresURL: pooled, AMQPURL: testenv.AMQP(t), Exchange: "events", Relay: outbox.Config{Lease: time.Second}}
			if listens {
				config.ListenURL = direct
			}
			if got := config.listenURL(); got != config.ListenURL {
				t.Errorf("listens at %q", got)
			}
			await(t, "all", serve(t, RunAll, config), http.StatusOK)

			db, err := postgres.Open(t.Context(), postgres.Config{URL: pooled})
			if err != nil {
				t.Fatal(err)
			}
			defer db.Close()
			const writers, each = 8, 6
			var group errgroup.Group
			for range writers {
				group.Go(func() error {
					writer := outbox.NewWriter(db, nil, nil)
					for i := range each {
						// No handler can read it, so it ends as a dead letter of its consumer.
						message := messaging.New(fmt.Sprint("key-", i%3), wrapperspb.String("text"))
						message.Type, message.Payload = Topology("").Queues[0].Types[0], []byte{0xff}
						err := writer.Transact(t.Context(), func(tx pgx.Tx) error { return outbox.Insert(t.Context(), tx, message) })
						if err != nil {
							return err
						}
					}
					return nil
				})
			}
			if err := group.Wait(); err != nil {
				t.Fatal(err)
			}
			testenv.Eventually(t, 30*time.Second, func() error {
				var letters int
				err := db.QueryRow(t.Context(), `SELECT count(DISTINCT message_id) FROM dead_letter WHERE consumer <> ''`).Scan(&letters)
				if err == nil && letters != writers*each {
					err = fmt.Errorf("%d of %d messages arrived", letters, writers*each)
				}
				return err
			})
		})
	}
}

// LISTEN is lost in such a pooler, and that is noticed. NOTIFY is not.
func TestDoorbellThroughAPooler(t *testing.T) {
	t.Parallel()
	direct := testenv.PostgresURL(t)
	pooled := testenv.PgBouncer(t, direct)
	if _, err := outbox.TryDoorbell(t.Context(), pooled, direct); err != nil {
		t.Errorf("rung through the pooler: %v", err)
	}
	if _, err := outbox.TryDoorbell(t.Context(), direct, pooled); err == nil {
		t.Error("heard through the pooler")
	}
}

// as is the URL of another user of the test's server, who needs no password.
func as(t *testing.T, rawURL, user string) string {
	t.Helper()
	parsed, err := url.Parse(rawURL)
	if err != nil {
		t.Fatal(err)
	}
	parsed.User = url.User(user)
	return parsed.String()
}
