package app

import (
	"context"
	"fmt"
	"testing"
	"time"

	"connectrpc.com/connect/v2"
	"example.com/shop/internal/dev/testenv"
	"example.com/shop/internal/inbox"
	"example.com/shop/internal/messaging"
	"example.com/shop/internal/outbox"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

const (
	probeGroup = "probes"
	probeQueue = ServiceName + "." + probeGroup
)

// probed gives a process a domain of one consumer group, which writes every text to the table effects.
func probed(config Config) Config {
	config.Exchange = "events"
	config.domain = func(deps) (domain, error) {
		probes := inbox.NewGroup(probeGroup)
		inbox.Handle(probes, func(ctx context.Context, tx pgx.Tx, text *wrapperspb.StringValue) error {
			_, err := tx.Exec(ctx, `INSERT INTO effects (effect) VALUES ($1)`, text.GetValue())
			return err
		})
		return domain{
			register: func(*connect.Server) {}, groups: []group{{probes, 2}}, publishes: []string{"google.protobuf"},
		}, nil
	}
	return config
}

// names returns a process that tells what a service with this config consists of.
func names(t *testing.T, config Config) *process {
	t.Helper()
	p, err := declared(config)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// effectsIn creates the table effects, and returns a function that waits until it contains n different effects.
func effectsIn(t *testing.T, db *pgxpool.Pool) (await func(n int)) {
	t.Helper()
	_, err := db.Exec(t.Context(), `
		CREATE TABLE effects (effect text NOT NULL);
		GRANT INSERT ON effects TO shop_consumer`)
	if err != nil {
		t.Fatal(err)
	}
	return func(n int) {
		t.Helper()
		testenv.Eventually(t, 30*time.Second, func() error {
			var all, distinct int
			const sql = `SELECT count(*), count(DISTINCT effect) FROM effects`
			err := db.QueryRow(t.Context(), sql).Scan(&all, &distinct)
			if err == nil && (all != n || distinct != n) {
				err = fmt.Errorf("%d effects of %d messages, want %d", all, distinct, n)
			}
			return err
		})
	}
}

func send(ctx context.Context, db *pgxpool.Pool, key, text string) error {
	return outbox.NewWriter(db, nil, nil).Transact(ctx, func(tx pgx.Tx) error {
		return outbox.Insert(ctx, tx, messaging.New(key, wrapperspb.String(text)))
	})
}
