package app

import (
	"context"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect/v2"
	"example.com/shop/internal/changes"
	"example.com/shop/internal/dev/testenv"
	"example.com/shop/internal/inbox"
	"example.com/shop/internal/session"
	"github.com/jackc/pgx/v5"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// A watcher in the API process sees what a handler changes in the consumer process.
func TestChangesCrossProcesses(t *testing.T) {
	t.Parallel()
	db := testenv.Postgres(t)
	_, err := db.Exec(t.Context(), `CREATE TABLE effects (effect text PRIMARY KEY, times integer NOT NULL)`)
	if err != nil {
		t.Fatal(err)
	}
	topics := make(chan *changes.Topic[*wrapperspb.Int32Value], 2)
	url := db.Config().ConnString()
	config := Config{PostgresURL: url, AMQPURL: testenv.AMQP(t), Exchange: "events"}
	config.domain = func(d deps) (domain, error) {
		type states = map[string]*wrapperspb.Int32Value
		topic := changes.NewTopic(d.changes, "effect", func(ctx context.Context, keys []string) (states, error) {
			rows, _ := d.db.Query(ctx, `SELECT effect, times FROM effects WHERE effect = ANY ($1)`, keys)
			found := states{}
			var effect string
			var times int32
			_, err := pgx.ForEachRow(rows, []any{&effect, &times}, func() error {
				found[effect] = wrapperspb.Int32(times)
				return nil
			})
			return found, err
		})
		topics <- topic
		counted := inbox.NewGroup(probeGroup)
		inbox.Handle(counted, func(ctx context.Context, tx pgx.Tx, text *wrapperspb.StringValue) error {
			topic.Touch(tx, text.GetValue())
			_, err := tx.Exec(ctx, `
				INSERT INTO effects VALUES ($1, 1) ON CONFLICT (effect) DO UPDATE SET times = effects.times + 1`,
				text.GetValue())
			return err
		})
		return domain{register: func(*connect.Server) {}, groups: []group{{counted, 1}}}, nil
	}
	await(t, "api", serve(t, RunAPI, config), http.StatusOK)
	watched := <-topics
	await(t, "consumer", serve(t, RunConsumer, config), http.StatusOK)
	await(t, "relay", serve(t, RunRelay, config), http.StatusOK)

	// The safety interval would find the change later anyway, so check the notifications themselves.
	rung := make(chan string, 100)
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	var listening sync.WaitGroup
	t.Cleanup(func() { cancel(); listening.Wait() })
	listening.Go(func() { session.Listen(ctx, url, "changes", func(payload string) { rung <- payload }) })
	testenv.Eventually(t, 20*time.Second, func() error {
		var listeners int
		err := db.QueryRow(t.Context(), `
			SELECT count(*) FROM pg_stat_activity
			WHERE datname = current_database() AND query = 'LISTEN "changes"'`).Scan(&listeners)
		if err == nil && listeners != 2 {
			err = fmt.Errorf("%d sessions listen, want those of the API and the test", listeners)
		}
		return err
	})

	if err := send(t.Context(), db, "key", "word"); err != nil {
		t.Fatal(err)
	}
	for payload := range rung {
		if strings.Contains(payload, `"effect"`) && strings.Contains(payload, `"word"`) {
			break
		}
	}
	want := int32(1)
	for state, err := range watched.Watch(ctx, "word") {
		if err != nil || state.GetValue() != want {
			t.Fatalf("got %v, %v, want %d", state, err, want)
		}
		if want++; want > 3 {
			break
		}
		if err := send(t.Context(), db, "key", "word"); err != nil {
			t.Fatal(err)
		}
	}
}
