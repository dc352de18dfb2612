package orders_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"connectrpc.com/connect/v2"
	"connectrpc.com/connect/v2/connecthttp"
	"example.com/shop/internal/dev/testenv"
	ordersv1 "example.com/shop/internal/gen/orders/v1"
	"example.com/shop/internal/gen/orders/v1/ordersv1connect"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

// process serves an orders.Service on a port, as a separate process would, and counts its statements.
type process struct {
	ordersv1connect.OrderServiceClient
	statements atomic.Int64
	drain      func() // begins the shutdown
	drained    chan error
}

func startAPI(t *testing.T, db *pgxpool.Pool) *process {
	t.Helper()
	p := &process{drained: make(chan error, 1)}
	server := edge(newService(t, db, func(config *pgxpool.Config) { config.ConnConfig.Tracer = p }))
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	var serving sync.WaitGroup
	serving.Go(func() { p.drained <- server.Serve(ctx, listener) })
	transport := &http.Transport{Protocols: new(http.Protocols)}
	transport.Protocols.SetUnencryptedHTTP2(true)
	p.drain = cancel
	t.Cleanup(func() { cancel(); transport.CloseIdleConnections(); serving.Wait() })
	client := connecthttp.NewTransport(&http.Client{Transport: transport}, "http://"+listener.Addr().String())
	p.OrderServiceClient = ordersv1connect.NewOrderServiceClient(connect.NewClient(client))
	return p
}

// TraceQueryStart implements pgx.QueryTracer.
func (p *process) TraceQueryStart(ctx context.Context, _ *pgx.Conn, query pgx.TraceQueryStartData) context.Context {
	if !strings.HasPrefix(query.SQL, "-- ping") {
		p.statements.Add(1)
	}
	return ctx
}

// TraceQueryEnd implements pgx.QueryTracer.
func (p *process) TraceQueryEnd(context.Context, *pgx.Conn, pgx.TraceQueryEndData) {}

// watchers follow orders at one process and record the statuses that they see.
type watchers struct {
	running sync.WaitGroup
	seen    chan ordersv1.OrderStatus // in the order in which each watcher sees them
	failed  chan error
}

func (p *process) watch(t *testing.T, ids []string) *watchers {
	t.Helper()
	w := &watchers{seen: make(chan ordersv1.OrderStatus, 3*len(ids)), failed: make(chan error, len(ids))}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), time.Minute)
	for _, id := range ids {
		w.running.Go(func() {
			if err := p.follow(ctx, id, w.seen); err != nil {
				w.failed <- err
			}
		})
	}
	t.Cleanup(func() { cancel(); w.running.Wait() })
	return w
}

func (p *process) follow(ctx context.Context, id string, seen chan<- ordersv1.OrderStatus) error {
	stream, err := p.WatchOrder(ctx, &ordersv1.WatchOrderRequest{OrderId: id})
	if err != nil {
		return err
	}
	defer stream.Close()
	for {
		res, err := stream.Receive()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		seen <- res.GetOrder().GetStatus()
	}
}

func (w *watchers) want(t *testing.T, n int, status ordersv1.OrderStatus) {
	t.Helper()
	for i := range n {
		select {
		case got := <-w.seen:
			if got != status {
				t.Fatalf("got %s, want %s", got, status)
			}
		case err := <-w.failed:
			t.Fatalf("failed with %v", err)
		case <-time.After(time.Minute):
			t.Fatalf("only %d of %d watchers saw that the order is %s", i, n, status)
		}
	}
}

const crowd = 1000

// A thousand streams over HTTP cost the database the same as one stream, whether they watch one order or many. Another
// process makes the changes.
func TestManyWatchersCostWhatOneDoes(t *testing.T) {
	t.Parallel()
	cost := map[string]int64{}
	for name, test := range map[string]struct{ watchers, orders int }{
		"one watcher": {1, 1}, "one order": {crowd, 1}, "many orders": {crowd, crowd / 10},
	} {
		b := setup(t)
		b.setStock(t, crowd, "apple")
		var ids, placedIDs []string
		for range test.orders {
			placedIDs = append(placedIDs, b.place(t, 1, "apple"))
		}
		for i := range test.watchers {
			ids = append(ids, placedIDs[i%test.orders])
		}
		p := startAPI(t, b.db)
		w := p.watch(t, ids)
		w.want(t, len(ids), placed)
		joined := p.statements.Swap(0)
		b.deliver(t)
		w.want(t, len(ids), confirmed)
		cost[name] = p.statements.Load()
		t.Logf("%s: %d statements until all watchers had joined, %d for a change", name, joined, cost[name])
		p.drain()
	}
	// Several transactions confirm the orders, which takes several rounds of one statement each.
	if cost["one order"] > cost["one watcher"]+1 || cost["many orders"] > cost["one watcher"]+5 {
		t.Errorf("statements for a change: %v", cost)
	}
}

// On shutdown, streams end at once, with the code that tells clients to try again. Clients that try again receive the
// current state first, and miss nothing.
func TestWatchersResumeAtAnotherProcess(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.setStock(t, 1, "apple")
	id := b.place(t, 1, "apple")
	ids := []string{}
	for range crowd {
		ids = append(ids, id)
	}
	first, second := startAPI(t, b.db), startAPI(t, b.db)
	w := first.watch(t, ids)
	w.want(t, crowd, placed)
	began := time.Now()
	first.drain()
	if err := <-first.drained; err != nil { // within the server's DrainTimeout
		t.Errorf("drain: %v", err)
	}
	t.Logf("%d streams ended in %s", crowd, time.Since(began))
	for range crowd {
		wantCode(t, <-w.failed, connect.CodeUnavailable, "server is shutting down, try again")
	}
	b.deliver(t) // while nobody watches
	w = second.watch(t, ids)
	w.want(t, crowd, confirmed)
	b.cancel(t, id)
	w.want(t, crowd, cancelled)
}

// A watcher sees changes that any process makes: the one that serves the watcher, another API process, or a consumer.
func TestWatchOrderHearsOtherProcesses(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.setStock(t, 1, "apple")
	p := startAPI(t, b.db)
	ids := []string{b.place(t, 1, "apple"), b.place(t, 1, "pear")}
	w := p.watch(t, ids)
	w.want(t, 2, placed)
	awaitListeners(t, b.db, 2)
	b.deliver(t)
	got := map[ordersv1.OrderStatus]int{<-w.seen: 1}
	got[<-w.seen]++
	if got[confirmed] != 1 || got[rejected] != 1 {
		t.Errorf("got %v", got)
	}
	if _, err := p.CancelOrder(t.Context(), &ordersv1.CancelOrderRequest{OrderId: ids[0]}); err != nil {
		t.Fatal(err)
	}
	w.want(t, 1, cancelled)
}

// awaitListeners waits until at least n connections listen for changes.
func awaitListeners(t *testing.T, db *pgxpool.Pool, n int) {
	t.Helper()
	testenv.Eventually(t, 20*time.Second, func() error {
		var listening int
		err := db.QueryRow(t.Context(), `
			SELECT count(*) FROM pg_stat_activity
			WHERE datname = current_database() AND query = 'LISTEN "changes"' AND state = 'idle'`).Scan(&listening)
		if err == nil && listening < n {
			err = fmt.Errorf("%d of %d listen", listening, n)
		}
		return err
	})
}
