package operations

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect/v2"
	"connectrpc.com/connect/v2/connecthttp"
	"example.com/shop/internal/changes"
	"example.com/shop/internal/dev/probe"
	"example.com/shop/internal/dev/testenv"
	operationsv1 "example.com/shop/internal/gen/shop/operations/v1"
	"example.com/shop/internal/gen/shop/operations/v1/operationsv1connect"
	"example.com/shop/internal/inbox"
	"example.com/shop/internal/messaging"
	"example.com/shop/internal/outbox"
	"example.com/shop/internal/postgres"
	"example.com/shop/internal/rpcserver"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

func TestMain(m *testing.M) {
	slog.SetDefault(slog.New(slog.DiscardHandler)) // the tests cause errors on purpose
	testenv.Main(m)
}

var quiet = slog.New(slog.DiscardHandler)

// act is what a handler does after its effect.
type act func(ctx context.Context, out *outbox.Writer) error

// bundle is a process that accepts durable calls, and a worker. The test itself delivers the messages between them, so
// it controls when and how often they arrive.
type bundle struct {
	operationsv1connect.OperationServiceClient
	client, grpc *connect.Client
	db           *pgxpool.Pool
	out          *outbox.Writer
	calls        *Operations
	worker       *Worker
	returned     int64 // id of the last outbox row that messages has returned

	mu      sync.Mutex
	acts    map[string][]act // by the text of the request; one per run, the last one for all further runs
	runs    map[string]int
	callers map[string]string // the caller that the handler saw
}

// callerHeader has the name of a test's caller. callerKey is its key in the context.
const callerHeader = "Test-Caller"

type callerKey struct{}

func callerOf(ctx context.Context) string {
	name, _ := ctx.Value(callerKey{}).(string)
	return name
}

var testIdentity = Identity{
	Name:    callerOf,
	Capture: func(ctx context.Context) ([]byte, error) { return json.Marshal(callerOf(ctx)) },
	Restore: func(ctx context.Context, captured []byte) (context.Context, error) {
		var name string
		err := json.Unmarshal(captured, &name)
		return context.WithValue(ctx, callerKey{}, name), err
	},
}

func identify(next connect.ServerFunc) connect.ServerFunc {
	return func(ctx context.Context, spec connect.Spec, stream connect.ServerStream) error {
		info, _ := connect.CallInfoForServerContext(ctx)
		return next(context.WithValue(ctx, callerKey{}, info.RequestHeader().Get(callerHeader)), spec, stream)
	}
}

func keyOf(text string) []byte { return []byte(fmt.Sprintf("%032s", text)) }

var signing = Config{Identity: testIdentity, Keys: [][]byte{keyOf("first")}}

func setup(t *testing.T, config WorkerConfig) *bundle {
	t.Helper()
	b := &bundle{acts: map[string][]act{}, runs: map[string]int{}, callers: map[string]string{}}
	b.db = testenv.Postgres(t)
	b.exec(t, `CREATE TABLE effects (seq bigint GENERATED ALWAYS AS IDENTITY, text text NOT NULL)`)
	b.out = outbox.NewWriter(b.db, nil, nil)
	b.calls = b.newOperations(t, signing)
	if config.Inbox.MaxAttempts == 0 {
		config.Inbox = inbox.Config{MaxAttempts: 3, RetryBase: time.Nanosecond}
	}
	b.worker = b.newWorker(config)
	server := httptest.NewUnstartedServer(rpcserver.New(rpcserver.Config{
		Log: quiet, Interceptors: []connect.ServerInterceptor{identify, b.calls.Interceptor()},
	}, b.register, b.calls.Register))
	server.Config.Protocols = new(http.Protocols)
	server.Config.Protocols.SetHTTP1(true)
	server.Config.Protocols.SetUnencryptedHTTP2(true)
	server.Start()
	t.Cleanup(server.Close)
	b.client = connect.NewClient(connecthttp.NewTransport(server.Client(), server.URL))
	protocols := new(http.Protocols)
	protocols.SetUnencryptedHTTP2(true)
	transport := &http.Transport{Protocols: protocols}
	t.Cleanup(transport.CloseIdleConnections)
	b.grpc = connect.NewClient(connecthttp.NewTransport(
		&http.Client{Transport: transport}, server.URL, connecthttp.WithGRPC()))
	b.OperationServiceClient = operationsv1connect.NewOperationServiceClient(b.client)
	return b
}

// newOperations makes Operations with a hub of its own, as another process would.
func (b *bundle) newOperations(t *testing.T, config Config) *Operations {
	t.Helper()
	url := b.db.Config().ConnString()
	hub := changes.New(changes.Config{NotifyURL: url, ListenURL: url, SafetyInterval: time.Hour})
	made := New(b.db, b.out, hub, config)
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	var running sync.WaitGroup
	running.Go(func() { hub.Ring(ctx) })
	running.Go(func() { hub.Follow(ctx) })
	t.Cleanup(func() { cancel(); running.Wait() })
	return made
}

func (b *bundle) newWorker(config WorkerConfig) *Worker {
	server := connect.NewServer(rpcserver.Interceptors(quiet)...)
	b.register(server)
	return NewWorker(b.db, b.calls, server, config)
}

func (b *bundle) register(server *connect.Server) {
	for _, spec := range []connect.Spec{probe.Mutate, probe.Slow, probe.Plain, probe.Read, probe.Follow} {
		probe.Handle(server, spec, b.handle)
	}
}

// handle writes its effect and then runs the act that the test has set.
func (b *bundle) handle(ctx context.Context, text string) (string, error) {
	b.mu.Lock()
	run := b.runs[text]
	b.runs[text]++
	b.callers[text] = callerOf(ctx)
	var do act
	if acts := b.acts[text]; len(acts) > 0 {
		do = acts[min(run, len(acts)-1)]
	}
	b.mu.Unlock()
	err := b.out.Transact(ctx, func(tx pgx.Tx) error {
		_, err := tx.Exec(ctx, `INSERT INTO effects (text) VALUES ($1)`, text)
		return err
	})
	if err == nil && do != nil {
		err = do(ctx, b.out)
	}
	return "did " + text, err
}

// on sets the acts of the handler for a text: the first act is for the first run, and so on.
func (b *bundle) on(text string, acts ...act) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.acts[text] = acts
}

func (b *bundle) ran(text string) (runs int, caller string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.runs[text], b.callers[text]
}

func fails(err error) act { return func(context.Context, *outbox.Writer) error { return err } }

// as returns a client context of a caller.
func as(ctx context.Context, caller string) context.Context {
	ctx, info := connect.NewClientContext(ctx)
	info.RequestHeader().Set(callerHeader, caller)
	return ctx
}

// submit makes a durable call over HTTP and returns the operation's name. headers are pairs of name and value.
func submit(
	ctx context.Context, client *connect.Client, spec connect.Spec, text string, headers ...string,
) (string, error) {
	ctx, info := connect.NewClientContext(ctx)
	info.RequestHeader().Set(preferHeader, respondAsync)
	info.RequestHeader().Set(callerHeader, "alice")
	for i := 0; i < len(headers); i += 2 {
		info.RequestHeader().Set(headers[i], headers[i+1])
	}
	answer, err := probe.Call(ctx, client, spec, text)
	if err == nil && (answer != "" || info.ResponseHeader().Get(appliedHeader) != respondAsync) {
		err = fmt.Errorf("got answer %q, want an empty one", answer)
	}
	return info.ResponseHeader().Get(nameHeader), err
}

func (b *bundle) submit(t *testing.T, text string, headers ...string) (name string) {
	t.Helper()
	name, err := submit(t.Context(), b.client, probe.Mutate, text, headers...)
	if err != nil {
		t.Fatal(err)
	}
	return name
}

// messages returns the messages that were inserted into the outbox since the last call of messages.
func (b *bundle) messages(t *testing.T) []messaging.Delivery {
	t.Helper()
	rows, _ := b.db.Query(t.Context(), `
		SELECT id, message_id::text, type, payload FROM outbox WHERE id > $1 ORDER BY id`, b.returned)
	found, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (d messaging.Delivery, err error) {
		return d, row.Scan(&b.returned, &d.ID, &d.Type, &d.Payload)
	})
	if err != nil {
		t.Fatal(err)
	}
	return found
}

// deliver delivers messages to the worker, each twice because copies are normal. Then it runs all retries.
func (b *bundle) deliver(t *testing.T) {
	t.Helper()
	batch := b.messages(t)
	for range 2 {
		if err := b.worker.Process(t.Context(), batch); err != nil {
			t.Fatal(err)
		}
	}
	for found := true; found; {
		var err error
		if found, err = b.worker.box.RetryNext(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
}

func (b *bundle) get(t *testing.T, name string) *operationsv1.Operation {
	t.Helper()
	response, err := b.GetOperation(as(t.Context(), "alice"), &operationsv1.GetOperationRequest{Name: name})
	if err != nil {
		t.Fatal(err)
	}
	return response.GetOperation()
}

// wantState checks the state of an operation and its result, as resultOf returns it.
func (b *bundle) wantState(
	t *testing.T, name string, state operationsv1.OperationState, result string,
) *operationsv1.Operation {
	t.Helper()
	got := b.get(t, name)
	if got.GetState() != state || resultOf(t, got) != result {
		t.Errorf("%s is %s with %s, want %s with %s", name, got.GetState(), resultOf(t, got), state, result)
	}
	return got
}

// wantEffects checks that exactly these effects were made, once each and in this order.
func (b *bundle) wantEffects(t *testing.T, want ...string) {
	t.Helper()
	rows, _ := b.db.Query(t.Context(), `SELECT text FROM effects ORDER BY seq`)
	got, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil || fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("got effects %q, error %v, want %q", got, err, want)
	}
}

func (b *bundle) exec(t *testing.T, sql string, args ...any) {
	t.Helper()
	err := postgres.Transact(t.Context(), b.db, func(tx pgx.Tx) error {
		_, err := tx.Exec(t.Context(), sql, args...)
		return err
	})
	if err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
}

func (b *bundle) count(t *testing.T, sql string, args ...any) (n int) {
	t.Helper()
	if err := b.db.QueryRow(t.Context(), sql, args...).Scan(&n); err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
	return n
}

func wantCode(t *testing.T, err error, want connect.Code) {
	t.Helper()
	var got *connect.Error
	if !errors.As(err, &got) || got.Code() != want {
		t.Errorf("got error %v, want %s", err, want)
	}
}

// closedGate returns a gate that stays closed, because no relay empties the outbox.
func closedGate(t *testing.T, db *pgxpool.Pool) *outbox.Gate {
	t.Helper()
	if _, err := db.Exec(t.Context(), `SELECT outbox_insert('type', 'key', '')`); err != nil {
		t.Fatal(err)
	}
	gate := outbox.NewGate(db, outbox.GateConfig{MaxMessages: 1})
	ctx, cancel := context.WithCancel(t.Context())
	var running sync.WaitGroup
	running.Go(func() { gate.Run(ctx) })
	t.Cleanup(func() { cancel(); running.Wait() })
	testenv.Eventually(t, 20*time.Second, func() error {
		if gate.Check() == nil {
			return errors.New("the gate is open")
		}
		return nil
	})
	return gate
}
