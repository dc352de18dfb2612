package app

import (
	"fmt"
	"net/http"
	"testing"
	"time"

	"example.com/shop/internal/dev/testenv"
	"example.com/shop/internal/outbox"
	"example.com/shop/internal/postgres"
	"golang.org/x/sync/errgroup"
)

// The service works through a pooler in transaction mode, with the doorbell on a direct connection or without it.
func TestThroughAPooler(t *testing.T) {
	t.Parallel()
	for name, listens := range map[string]bool{"Listening": true, "Polling": false} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			owner := testenv.Postgres(t)
			awaitEffects := effectsIn(t, owner)
			direct := testenv.As(t, owner.Config().ConnString(), "shop_all")
			pooled := testenv.PgBouncer(t, direct)
			config := probed(Config{PostgresURL: pooled, AMQPURL: testenv.AMQP(t),
				Relay: outbox.Config{Lease: time.Second}})
			if listens {
				config.ListenURL = direct
			}
			if got := config.listenURL(); got != config.ListenURL {
				t.Errorf("URL for LISTEN is %q", got)
			}
			await(t, "all", serve(t, RunAll, config), http.StatusOK)

			db, err := postgres.Open(t.Context(), postgres.Config{URL: pooled})
			if err != nil {
				t.Fatal(err)
			}
			defer db.Close()
			const writers, each = 10, 20
			var group errgroup.Group
			for w := range writers {
				group.Go(func() error {
					for i := range each {
						if err := send(t.Context(), db, fmt.Sprint("key-", i%3), fmt.Sprint(w, "/", i)); err != nil {
							return err
						}
					}
					return nil
				})
			}
			if err := group.Wait(); err != nil {
				t.Fatal(err)
			}
			awaitEffects(writers * each)
		})
	}
}
