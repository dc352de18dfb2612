package app

import (
	"cmp"
	"context"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect/v2"
	"example.com/shop/internal/changes"
	"example.com/shop/internal/console"
	"example.com/shop/internal/dev/testenv"
	"example.com/shop/internal/gen/ops/v1/opsv1connect"
	"example.com/shop/internal/ops"
	"example.com/shop/internal/outbox"
	"example.com/shop/internal/telemetry"
)

// startConsoleAPI serves ops.v1 on its own database, which contains dead letters and retries.
func startConsoleAPI(t *testing.T) *api {
	t.Helper()
	edge, err := newEdge(Edge{NoAuth: true})
	if err != nil {
		t.Fatal(err)
	}
	a := &api{db: testenv.Postgres(t)}
	if _, err := ops.Shards(t.Context(), a.db); err != nil { // the first count of the backlog adds a row
		t.Fatal(err)
	}
	_, err = a.db.Exec(t.Context(), `
		INSERT INTO dead_letter (consumer, message_id, type, key, payload, headers, reason, error, attempts)
		SELECT 'group', n::text, 't.T', 'k', '', '{}', 'permanent', 'broken', 1 FROM generate_series(1, 100) AS n;
		INSERT INTO inbox_retry (consumer, message_id, type, key, payload, headers, attempts, due_at, last_error)
		SELECT 'group', n::text, 't.T', 'k', '', '{}', 1, now(), '' FROM generate_series(1, 100) AS n`)
	if err != nil {
		t.Fatal(err)
	}
	groups := []console.Group{{Group: ops.Group{Name: "group"}, Queue: "q"}}
	p := &process{
		config: probed(Config{}), edge: edge, telemetry: new(telemetry.Providers), db: a.db,
		out: outbox.NewWriter(a.db, nil, nil), changes: changes.New(changes.Config{}),
	}
	if err := p.compose(); err != nil {
		t.Fatal(err)
	}
	a.server = p.newConsoleServer(console.New(console.Config{DB: a.db, Groups: groups}))
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	a.url = "http://" + listener.Addr().String()
	ctx, stop := context.WithCancel(t.Context())
	served := make(chan error, 1)
	go func() { served <- a.server.Serve(ctx, listener) }()
	t.Cleanup(func() {
		stop()
		if err := <-served; err != nil {
			t.Error(err)
		}
	})
	return a
}

// TestBadInputToTheConsole is TestBadInput for ops.v1.
func TestBadInputToTheConsole(t *testing.T) {
	t.Parallel()
	duration, err := time.ParseDuration(cmp.Or(os.Getenv("FUZZTIME"), "500ms"))
	if err != nil {
		t.Fatal(err)
	}
	a := startConsoleAPI(t)
	var all []connect.Spec
	for spec := range a.server.Specs() {
		// WatchFlow has no input and does not end.
		if strings.HasPrefix(spec.Procedure, "/ops.") && spec.Procedure != opsv1connect.OpsServiceWatchFlowProcedure {
			all = append(all, spec)
		}
	}
	for _, spec := range all { // sequentially, so that a new row belongs to one procedure
		f := newFuzz(t, a, spec, all)
		f.run(duration)
		f.report()
	}
}
