package idempotency

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"connectrpc.com/connect/v2"
	"connectrpc.com/connect/v2/connecthttp"
	"example.com/shop/internal/dev/probe"
	"example.com/shop/internal/dev/testenv"
	"example.com/shop/internal/outbox"
	"example.com/shop/internal/rpcserver"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

func TestMain(m *testing.M) { testenv.Main(m) }

const callerHeader = "Test-Caller"

// bundle is a server whose handler counts its runs, includes the count in its answer, and writes an effect to the
// database.
type bundle struct {
	client *connect.Client
	db     *pgxpool.Pool
	keys   *Keys
	runs   atomic.Int64
	// then is what the handler does after it has written its effect.
	then func(ctx context.Context, text string) error
}

func setup(t *testing.T) *bundle {
	t.Helper()
	b := &bundle{db: testenv.Postgres(t), then: func(context.Context, string) error { return nil }}
	if _, err := b.db.Exec(t.Context(), `CREATE TABLE effects (text text NOT NULL)`); err != nil {
		t.Fatal(err)
	}
	b.keys = b.newKeys()
	b.client = b.serve(t, b.keys)
	return b
}

func (b *bundle) newKeys() *Keys {
	caller := func(ctx context.Context) string {
		info, _ := connect.CallInfoForServerContext(ctx)
		return info.RequestHeader().Get(callerHeader)
	}
	return New(b.db, outbox.NewWriter(b.db, nil, nil), Config{Caller: caller, Retention: time.Hour})
}

// serve starts a server, as another process would, and returns its client.
func (b *bundle) serve(t *testing.T, keys *Keys) *connect.Client {
	t.Helper()
	server := httptest.NewServer(rpcserver.New(rpcserver.Config{
		Log: slog.New(slog.DiscardHandler), Interceptors: []connect.ServerInterceptor{keys.Interceptor()},
	}, func(s *connect.Server) {
		for _, spec := range []connect.Spec{probe.Mutate, probe.Slow, probe.Plain, probe.Read} {
			probe.Handle(s, spec, b.handle)
		}
	}))
	t.Cleanup(server.Close)
	return connect.NewClient(connecthttp.NewTransport(server.Client(), server.URL))
}

func (b *bundle) handle(ctx context.Context, text string) (string, error) {
	run := b.runs.Add(1)
	err := outbox.NewWriter(b.db, nil, nil).Transact(ctx, func(tx pgx.Tx) error {
		_, err := tx.Exec(ctx, `INSERT INTO effects (text) VALUES ($1)`, text)
		return err
	})
	if err == nil {
		err = b.then(ctx, text)
	}
	return fmt.Sprintf("%s in run %d", text, run), err
}

// send makes a call with a key. replayed reports whether the answer was stored.
func send(
	ctx context.Context, client *connect.Client, spec connect.Spec, text, key, caller string,
) (answer string, replayed bool, err error) {
	ctx, info := connect.NewClientContext(ctx)
	info.RequestHeader().Set(keyHeader, key)
	info.RequestHeader().Set(callerHeader, caller)
	answer, err = probe.Call(ctx, client, spec, text)
	return answer, info.ResponseHeader().Get(replayedHeader) == "true", err
}

func (b *bundle) want(t *testing.T, spec connect.Spec, text, key, caller, want string, stored bool) {
	t.Helper()
	answer, replayed, err := send(t.Context(), b.client, spec, text, key, caller)
	if err != nil || answer != want || replayed != stored {
		t.Errorf("%s with %s by %s: got %q, stored %t, error %v; want %q, stored %t",
			text, key, caller, answer, replayed, err, want, stored)
	}
}

func (b *bundle) wantCode(t *testing.T, spec connect.Spec, text, key string, want connect.Code) error {
	t.Helper()
	_, _, err := send(t.Context(), b.client, spec, text, key, "alice")
	if connect.CodeOf(err) != want {
		t.Errorf("%s with %q: got error %v, want %s", text, key, err, want)
	}
	return err
}

func (b *bundle) wantEffects(t *testing.T, want int) {
	t.Helper()
	var got int
	if err := b.db.QueryRow(t.Context(), `SELECT count(*) FROM effects`).Scan(&got); err != nil || got != want {
		t.Errorf("got %d effects, error %v, want %d", got, err, want)
	}
}

func TestARepeatGetsTheStoredResponse(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.want(t, probe.Mutate, "text", "key", "alice", "text in run 1", false)
	b.want(t, probe.Mutate, "text", "key", "alice", "text in run 1", true)
	b.want(t, probe.Mutate, "text", "other", "alice", "text in run 2", false)
	b.want(t, probe.Mutate, "text", "key", "bob", "text in run 3", false)
	b.client = b.serve(t, b.newKeys()) // another process
	b.want(t, probe.Mutate, "text", "key", "alice", "text in run 1", true)
	b.wantEffects(t, 3)
}

// A closed gate refuses only calls that would be executed.
func TestARepeatIsAnsweredWhileTheBacklogIsFull(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.want(t, probe.Mutate, "text", "key", "alice", "text in run 1", false)
	b.client = b.serve(t, New(b.db, outbox.NewWriter(b.db, nil, closedGate(t, b.db)), b.keys.config))
	b.want(t, probe.Mutate, "text", "key", "alice", "text in run 1", true)
	b.wantCode(t, probe.Mutate, "other text", "key", connect.CodeAlreadyExists)
	b.wantCode(t, probe.Mutate, "text", "other key", connect.CodeResourceExhausted)
	_, _, err := send(t.Context(), b.client, probe.Mutate, "text", "key", "bob")
	if connect.CodeOf(err) != connect.CodeResourceExhausted {
		t.Errorf("another caller's key: got error %v, want %s", err, connect.CodeResourceExhausted)
	}
	b.wantEffects(t, 1)
}

func TestAnotherRequestIsRefused(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.want(t, probe.Mutate, "text", "key", "alice", "text in run 1", false)
	b.wantCode(t, probe.Mutate, "other text", "key", connect.CodeAlreadyExists)
	b.wantCode(t, probe.Slow, "text", "key", connect.CodeAlreadyExists)
	b.wantCode(t, probe.Mutate, "text", "", connect.CodeInvalidArgument)
	b.wantCode(t, probe.Mutate, "text", strings.Repeat("k", maxKey+1), connect.CodeInvalidArgument)
	b.wantEffects(t, 1)
}

// A mutating method that has not opted in refuses keys, and the error names the option.
func TestOnlyMethodsThatOptedInAcceptKeys(t *testing.T) {
	t.Parallel()
	b := setup(t)
	err := b.wantCode(t, probe.Plain, "text", "key", connect.CodeFailedPrecondition)
	if !strings.Contains(err.Error(), "option (idempotency.v1.key) = true") {
		t.Errorf("error does not name the option: %v", err)
	}
	b.wantEffects(t, 0)
	b.want(t, probe.Read, "text", "key", "alice", "text in run 1", false)
	b.want(t, probe.Read, "text", "key", "alice", "text in run 2", false)
	if answer, err := probe.Call(t.Context(), b.client, probe.Plain, "text"); err != nil || answer != "text in run 3" {
		t.Errorf("without a key: got %q, error %v", answer, err)
	}
}

// A failed call leaves neither an effect nor a key.
func TestAFailureLeavesNothing(t *testing.T) {
	t.Parallel()
	b := setup(t)
	for _, failure := range []error{connect.NewError(connect.CodeFailedPrecondition, "not yet"), errors.New("broken")} {
		b.then = func(context.Context, string) error { return failure }
		_, _, err := send(t.Context(), b.client, probe.Mutate, "text", "key", "alice")
		if err == nil {
			t.Error("no error")
		}
	}
	b.then = func(context.Context, string) error { panic("broken") }
	b.wantCode(t, probe.Mutate, "text", "key", connect.CodeInternal)
	b.wantEffects(t, 0)
	b.then = func(context.Context, string) error { return nil }
	b.want(t, probe.Mutate, "other text", "key", "alice", "other text in run 4", false)
	b.wantEffects(t, 1)
}

// One of several concurrent repeats in two processes runs, and all get its answer. There are more repeats than
// connections.
func TestConcurrentRepeatsWaitForTheOneThatRuns(t *testing.T) {
	t.Parallel()
	b := setup(t)
	began, finish := make(chan struct{}), make(chan struct{})
	var once sync.Once
	b.then = func(_ context.Context, text string) error {
		if text == "text" {
			once.Do(func() { close(began) })
			<-finish
		}
		return nil
	}
	clients := []*connect.Client{b.client, b.serve(t, b.newKeys())}
	var callers sync.WaitGroup
	var stored atomic.Int64
	for i := range 30 {
		callers.Go(func() {
			answer, replayed, err := send(t.Context(), clients[i%2], probe.Mutate, "text", "key", "alice")
			if err != nil || answer != "text in run 1" {
				t.Errorf("got %q, error %v", answer, err)
			}
			if replayed {
				stored.Add(1)
			}
		})
	}
	<-began
	if _, err := probe.Call(t.Context(), b.client, probe.Plain, "meanwhile"); err != nil {
		t.Errorf("call without a key meanwhile: %v", err)
	}
	close(finish)
	callers.Wait()
	if stored.Load() != 29 {
		t.Errorf("%d of 30 answers were stored ones, want 29", stored.Load())
	}
	if len(b.keys.turns.taken) > 0 {
		t.Errorf("turns are left: %v", b.keys.turns.taken)
	}
}

// A waiting repeat takes over the key if the running call fails. It gives up at its own deadline.
func TestAWaitingRepeatTakesOver(t *testing.T) {
	t.Parallel()
	b := setup(t)
	began, finish := make(chan struct{}), make(chan struct{})
	var runs atomic.Int64
	b.then = func(context.Context, string) error {
		if runs.Add(1) > 1 {
			return nil
		}
		close(began)
		<-finish
		return errors.New("broken")
	}
	var callers sync.WaitGroup
	callers.Go(func() { b.wantCode(t, probe.Mutate, "text", "key", connect.CodeInternal) })
	<-began
	short, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	_, _, err := send(short, b.client, probe.Mutate, "text", "key", "alice")
	if connect.CodeOf(err) != connect.CodeDeadlineExceeded {
		t.Errorf("repeat with a short deadline: got error %v, want %s", err, connect.CodeDeadlineExceeded)
	}
	other := b.serve(t, b.newKeys())
	callers.Go(func() {
		answer, replayed, err := send(t.Context(), other, probe.Mutate, "text", "key", "alice")
		if err != nil || replayed || !strings.HasPrefix(answer, "text in run") {
			t.Errorf("repeat without a deadline: got %q, stored %t, error %v", answer, replayed, err)
		}
	})
	testenv.Eventually(t, 10*time.Second, func() error {
		var waiting int
		err := b.db.QueryRow(t.Context(), `
			SELECT count(*) FROM pg_stat_activity
			WHERE datname = current_database() AND wait_event_type = 'Lock'`).Scan(&waiting)
		if err == nil && waiting == 0 {
			err = errors.New("no repeat waits in the database")
		}
		return err
	})
	close(finish)
	callers.Wait()
	b.wantEffects(t, 1)
}

func TestSweepDeletesOldKeys(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.want(t, probe.Mutate, "text", "old", "alice", "text in run 1", false)
	b.want(t, probe.Mutate, "text", "young", "alice", "text in run 2", false)
	_, err := b.db.Exec(t.Context(), `
		UPDATE idempotency_key SET created_at = created_at - interval '61 min' WHERE key = 'old'`)
	if err != nil {
		t.Fatal(err)
	}
	if err := b.keys.sweep(t.Context()); err != nil {
		t.Fatal(err)
	}
	b.want(t, probe.Mutate, "text", "young", "alice", "text in run 2", true)
	b.want(t, probe.Mutate, "text", "old", "alice", "text in run 3", false)
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
