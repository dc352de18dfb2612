package orders_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"connectrpc.com/connect/v2"
	"connectrpc.com/connect/v2/connecthttp"
	"example.com/shop/internal/changes"
	"example.com/shop/internal/dev/testenv"
	ordersv1 "example.com/shop/internal/gen/orders/v1"
	"example.com/shop/internal/gen/orders/v1/ordersv1connect"
	"example.com/shop/internal/idempotency"
	"example.com/shop/internal/inbox"
	"example.com/shop/internal/messaging"
	"example.com/shop/internal/orders"
	"example.com/shop/internal/outbox"
	"example.com/shop/internal/rpcserver"
	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

func TestMain(m *testing.M) { testenv.Main(m) }

// bundle is the domain as it runs in production, except that the test delivers the messages, when and as often as it
// likes.
type bundle struct {
	ordersv1connect.OrderServiceClient
	url  string
	http *http.Client
	db   *pgxpool.Pool // for the test's own queries
	link *link         // between the service and the database

	groups []*inbox.Group
	lastID int64 // the id of the last outbox row that messages has read
}

func setup(t *testing.T) *bundle {
	t.Helper()
	b := &bundle{db: testenv.Postgres(t), link: new(link)}
	service := newService(t, b.db, func(config *pgxpool.Config) { config.ConnConfig.DialFunc = b.link.dial })
	b.groups = []*inbox.Group{service.Fulfillment(), service.Notifications()}

	server := httptest.NewUnstartedServer(edge(service))
	server.Config.Protocols = new(http.Protocols)
	server.Config.Protocols.SetHTTP1(true)
	server.Config.Protocols.SetUnencryptedHTTP2(true) // for gRPC
	server.Start()
	t.Cleanup(server.Close)
	b.url, b.http = server.URL, server.Client()
	client := connect.NewClient(connecthttp.NewTransport(server.Client(), b.url))
	b.OrderServiceClient = ordersv1connect.NewOrderServiceClient(client)
	return b
}

// domain is the part of the domain that one API process runs.
type domain struct {
	*orders.Service
	keys *idempotency.Keys
}

// newService returns a domain on a pool like db, modified by change. Until the test ends, it follows the changes that
// other processes make.
func newService(t *testing.T, db *pgxpool.Pool, change func(config *pgxpool.Config)) *domain {
	t.Helper()
	config := db.Config()
	config.ConnConfig.RuntimeParams["role"] = "shop_api"
	change(config)
	own, err := pgxpool.NewWithConfig(t.Context(), config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(own.Close)
	url := db.Config().ConnString()
	// With so long an interval, watchers see a change only because of a notification.
	hub := changes.New(changes.Config{NotifyURL: url, ListenURL: url, SafetyInterval: time.Hour})
	out := outbox.NewWriter(own, nil, nil)
	service := &domain{orders.NewService(own, out, hub, orders.Config{}), idempotency.New(own, out, idempotency.Config{})}
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	var running sync.WaitGroup
	running.Go(func() { hub.Ring(ctx) })
	running.Go(func() { hub.Follow(ctx) })
	t.Cleanup(func() { cancel(); running.Wait() })
	return service
}

func edge(service *domain) *rpcserver.Server {
	config := rpcserver.Config{
		Log: slog.New(slog.DiscardHandler), Interceptors: []connect.ServerInterceptor{service.keys.Interceptor()},
	}
	return rpcserver.New(config, func(s *connect.Server) {
		ordersv1connect.RegisterOrderServiceHandler(s, service)
	})
}

// place places an order with the given quantity of each SKU, and returns its ID.
func (b *bundle) place(t testing.TB, quantity int32, skus ...string) string {
	t.Helper()
	req := order(quantity, skus...)
	if _, err := b.PlaceOrder(t.Context(), req); err != nil {
		t.Fatal(err)
	}
	return req.OrderId
}

func order(quantity int32, skus ...string) *ordersv1.PlaceOrderRequest {
	req := &ordersv1.PlaceOrderRequest{OrderId: uuid.NewString(), CustomerId: "customer-1"}
	for _, sku := range skus {
		req.Lines = append(req.Lines, &ordersv1.Line{Sku: sku, Quantity: quantity})
	}
	return req
}

func (b *bundle) setStock(t testing.TB, total int32, skus ...string) {
	t.Helper()
	for _, sku := range skus {
		if _, err := b.SetStock(t.Context(), &ordersv1.SetStockRequest{Sku: sku, Total: total}); err != nil {
			t.Fatal(err)
		}
	}
}

func (b *bundle) cancel(t testing.TB, id string) *ordersv1.Order {
	t.Helper()
	res, err := b.CancelOrder(t.Context(), &ordersv1.CancelOrderRequest{OrderId: id})
	if err != nil {
		t.Fatal(err)
	}
	return res.GetOrder()
}

func (b *bundle) wantStatus(t testing.TB, id string, want ordersv1.OrderStatus) *ordersv1.Order {
	t.Helper()
	res, err := b.GetOrder(t.Context(), &ordersv1.GetOrderRequest{OrderId: id})
	if err != nil {
		t.Fatal(err)
	}
	if got := res.GetOrder().GetStatus(); got != want {
		t.Errorf("order %s is %s, want %s", id, got, want)
	}
	return res.GetOrder()
}

func (b *bundle) wantStock(t testing.TB, sku string, free, reserved int32) {
	t.Helper()
	res, err := b.GetStock(t.Context(), &ordersv1.GetStockRequest{Sku: sku})
	if err != nil {
		t.Fatal(err)
	}
	if got := res.GetStock(); got.GetFree() != free || got.GetReserved() != reserved || got.GetTotal() != free+
		reserved {
		t.Errorf("stock is %v, want %d free and %d reserved", got, free, reserved)
	}
}

// messages returns the messages that were inserted into the outbox since the last call.
func (b *bundle) messages(t testing.TB) []messaging.Delivery {
	t.Helper()
	const sql = `SELECT id, message_id::text, type, key, payload FROM outbox WHERE id > $1 ORDER BY id`
	rows, err := b.db.Query(t.Context(), sql, b.lastID)
	if err != nil {
		t.Fatal(err)
	}
	deliveries, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (d messaging.Delivery, err error) {
		return d, row.Scan(&b.lastID, &d.ID, &d.Type, &d.Key, &d.Payload)
	})
	if err != nil {
		t.Fatal(err)
	}
	return deliveries
}

// deliver delivers messages to the groups until none are left. It delivers each message twice, as a broker may.
func (b *bundle) deliver(t testing.TB) {
	t.Helper()
	for batch := b.messages(t); len(batch) > 0; batch = b.messages(t) {
		b.handle(t, batch)
		b.handle(t, batch)
	}
}

// handle passes a batch to the groups that handle its types.
func (b *bundle) handle(t testing.TB, batch []messaging.Delivery) {
	t.Helper()
	for _, group := range b.groups {
		wanted := slices.DeleteFunc(slices.Clone(batch), func(d messaging.Delivery) bool {
			return !slices.Contains(group.Types(), d.Type)
		})
		if err := inbox.New(b.db, group, inbox.Config{}).Process(t.Context(), wanted); err != nil {
			t.Fatal(err)
		}
	}
}

// checkInvariants checks the invariants that are true whenever all messages are delivered.
func (b *bundle) checkInvariants(t testing.TB) {
	t.Helper()
	for what, sql := range map[string]string{
		"order neither confirmed nor rejected nor cancelled": `SELECT id::text FROM orders WHERE status = 'placed'`,
		"SKU whose reservations do not add up to its reserved pieces": `
			SELECT sku FROM stock LEFT JOIN reservations USING (sku)
			GROUP BY sku, reserved HAVING reserved <> coalesce(sum(quantity), 0)`,
		"confirmed order whose lines are not all reserved": `
			SELECT id::text FROM orders JOIN order_lines l ON l.order_id = id LEFT
				JOIN reservations r USING (order_id, sku)
			WHERE status = 'confirmed' AND r.quantity IS DISTINCT FROM l.quantity`,
		"order that has reserved stock but is not confirmed": `
			SELECT id::text FROM orders JOIN reservations ON order_id = id WHERE status <> 'confirmed'`,
		"confirmed or rejected order without exactly one notification": `
			SELECT o.id::text FROM orders o LEFT JOIN notifications n ON n.order_id = o.id AND n.kind = o.status
			WHERE status IN ('confirmed', 'rejected') GROUP BY o.id HAVING count(n.id) <> 1`,
		"duplicate notification": `
			SELECT order_id::text FROM notifications GROUP BY order_id, kind HAVING count(*) > 1`,
		"dead letter":                    `SELECT message_id::text FROM dead_letter`,
		"message that waits for a retry": `SELECT message_id::text FROM inbox_retry`,
	} {
		rows, _ := b.db.Query(t.Context(), sql)
		found, err := pgx.CollectRows(rows, pgx.RowTo[string])
		if err != nil {
			t.Fatal(err)
		}
		for _, id := range found {
			t.Errorf("%s: %s", what, id)
		}
	}
}

func (b *bundle) count(t testing.TB, sql string, args ...any) (n int) {
	t.Helper()
	if err := b.db.QueryRow(t.Context(), sql, args...).Scan(&n); err != nil {
		t.Fatal(err)
	}
	return n
}

func wantCode(t testing.TB, err error, want connect.Code, message string) {
	t.Helper()
	var got *connect.Error
	if !errors.As(err, &got) || got.Code() != want || (message != "" && got.Message() != message) {
		t.Errorf("got error %v, want %s: %s", err, want, message)
	}
}

// link connects the service to Postgres and can inject faults.
type link struct {
	away      atomic.Bool // all connections fail, and no new one can be opened
	cutCommit atomic.Bool // the next COMMIT is executed, but its answer is lost with the connection
}

func (l *link) dial(ctx context.Context, network, address string) (net.Conn, error) {
	if l.away.Load() {
		return nil, &net.OpError{Op: "dial", Net: network, Err: syscall.ECONNREFUSED}
	}
	conn, err := new(net.Dialer).DialContext(ctx, network, address)
	if err != nil {
		return nil, err
	}
	return &linked{Conn: conn, link: l}, nil
}

type linked struct {
	net.Conn
	link *link
	cut  atomic.Bool
}

func (c *linked) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if bytes.Contains(p[:n], []byte("COMMIT\x00")) && c.link.cutCommit.CompareAndSwap(true, false) {
		c.cut.Store(true)
	}
	if c.link.away.Load() || c.cut.Load() {
		c.Conn.Close()
		return 0, io.ErrUnexpectedEOF
	}
	return n, err
}
