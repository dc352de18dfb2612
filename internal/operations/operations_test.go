package operations

import (
	"context"
	"errors"
	"strings"
	"sync"
	"testing"

	"connectrpc.com/connect/v2"
	"connectrpc.com/connect/v2/connectproto"
	"example.com/shop/internal/dev/probe"
	operationsv1 "example.com/shop/internal/gen/shop/operations/v1"
	"example.com/shop/internal/messaging"
	"example.com/shop/internal/outbox"
	"example.com/shop/internal/postgres"
	"github.com/jackc/pgx/v5"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

const (
	pending   = operationsv1.OperationState_OPERATION_STATE_PENDING
	running   = operationsv1.OperationState_OPERATION_STATE_RUNNING
	succeeded = operationsv1.OperationState_OPERATION_STATE_SUCCEEDED
	failed    = operationsv1.OperationState_OPERATION_STATE_FAILED
	called    = operationsv1.OperationState_OPERATION_STATE_CANCELLED
)

// resultOf returns the text of a response, or the code and the text of an error.
func resultOf(t *testing.T, o *operationsv1.Operation) string {
	t.Helper()
	if status := o.GetError(); status != nil {
		return connect.Code(status.GetCode()).String() + ": " + status.GetMessage()
	}
	if o.GetResponse() == nil {
		return ""
	}
	var text wrapperspb.StringValue
	if err := o.GetResponse().UnmarshalTo(&text); err != nil {
		t.Fatal(err)
	}
	return text.GetValue()
}

func TestACallIsAcceptedNowAndExecutedLater(t *testing.T) {
	t.Parallel()
	b := setup(t, WorkerConfig{})
	for protocol, client := range map[string]*connect.Client{"connect": b.client, "grpc": b.grpc} {
		name, err := submit(t.Context(), client, probe.Mutate, protocol, preferHeader,
			"handling=lenient, Respond-Async; x=1")
		if err != nil {
			t.Fatal(err)
		}
		first := b.wantState(t, name, pending, "")
		runs, _ := b.ran(protocol)
		if runs != 0 || first.GetMethod() != "probe.durable.v1.Probe/Mutate" || first.GetStartTime() != nil {
			t.Errorf("ran %d times before the delivery: %v", runs, first)
		}
		b.deliver(t)
		last := b.wantState(t, name, succeeded, "did "+protocol)
		if runs, caller := b.ran(protocol); runs != 1 || caller != "alice" {
			t.Errorf("ran %d times for %q, want once for alice", runs, caller)
		}
		if last.GetAttempts() != 1 || last.GetStartTime() == nil || last.GetEndTime() == nil {
			t.Errorf("ended as %v", last)
		}
		b.exec(t, `DELETE FROM effects WHERE text = $1`, protocol)
	}
	if left := b.count(t, `SELECT count(*) FROM operation WHERE request <> ''`); left > 0 {
		t.Errorf("%d requests are left after the end of their operations", left)
	}
}

// A call without the header is executed as usual.
func TestACallWithoutThePreferenceIsExecutedNow(t *testing.T) {
	t.Parallel()
	b := setup(t, WorkerConfig{})
	ctx, info := connect.NewClientContext(t.Context())
	info.RequestHeader().Set(preferHeader, "respond-asynchronously, wait=1")
	if answer, err := probe.Call(ctx, b.client, probe.Mutate, "now"); err != nil || answer != "did now" {
		t.Errorf("got %q, error %v", answer, err)
	}
	if n := b.count(t, `SELECT count(*) FROM operation`); n != 0 {
		t.Errorf("got %d operations, want none", n)
	}
}

func TestOnlyIdempotentUnaryMethodsCanBeExecutedLater(t *testing.T) {
	t.Parallel()
	b := setup(t, WorkerConfig{})
	for _, spec := range []connect.Spec{probe.Plain, probe.Read} {
		_, err := submit(t.Context(), b.client, spec, "refused")
		wantCode(t, err, connect.CodeFailedPrecondition)
		if !strings.Contains(err.Error(), "option idempotency_level = IDEMPOTENT") {
			t.Errorf("error does not name the option: %v", err)
		}
	}
	ctx, info := connect.NewClientContext(t.Context())
	info.RequestHeader().Set(preferHeader, respondAsync)
	stream, err := b.client.CallServerStream(ctx, probe.Follow, wrapperspb.String("refused"))
	if err == nil {
		err = stream.Receive(&wrapperspb.StringValue{})
		_ = stream.Close()
	}
	wantCode(t, err, connect.CodeFailedPrecondition)
	b.wantEffects(t)
}

func TestAKeyIdentifiesOneOperation(t *testing.T) {
	t.Parallel()
	b := setup(t, WorkerConfig{})
	first := b.submit(t, "text", keyHeader, "key")
	if again := b.submit(t, "text", keyHeader, "key"); again != first {
		t.Errorf("the repeat returned %s, want %s", again, first)
	}
	_, err := submit(t.Context(), b.client, probe.Mutate, "other", keyHeader, "key")
	wantCode(t, err, connect.CodeAlreadyExists)
	_, err = submit(t.Context(), b.client, probe.Slow, "text", keyHeader, "key")
	wantCode(t, err, connect.CodeAlreadyExists)
	if others := b.submit(t, "text", keyHeader, "key", callerHeader, "bob"); others == first {
		t.Error("two callers with the same key share an operation")
	}
	if other := b.submit(t, "text"); other == first {
		t.Error("a call without a key returned the operation of a key")
	}
	_, err = submit(t.Context(), b.client, probe.Mutate, "text", keyHeader, strings.Repeat("k", maxKey+1))
	wantCode(t, err, connect.CodeInvalidArgument)
	b.deliver(t)
	if again := b.submit(t, "text", keyHeader, "key"); again != first {
		t.Errorf("the repeat after the end returned %s, want %s", again, first)
	}
	b.wantEffects(t, "text", "text", "text")
}

// A closed gate refuses only calls that would be submitted.
func TestARepeatedSubmitIsAnsweredWhileTheBacklogIsFull(t *testing.T) {
	t.Parallel()
	b := setup(t, WorkerConfig{})
	first := b.submit(t, "text", keyHeader, "key")
	b.calls.out = outbox.NewWriter(b.db, nil, closedGate(t, b.db))
	if again := b.submit(t, "text", keyHeader, "key"); again != first {
		t.Errorf("the repeat returned %s, want %s", again, first)
	}
	_, err := submit(t.Context(), b.client, probe.Mutate, "other", keyHeader, "key")
	wantCode(t, err, connect.CodeAlreadyExists)
	_, err = submit(t.Context(), b.client, probe.Mutate, "text", keyHeader, "other key")
	wantCode(t, err, connect.CodeResourceExhausted)
	_, err = submit(t.Context(), b.client, probe.Mutate, "text")
	wantCode(t, err, connect.CodeResourceExhausted)
	if n := b.count(t, `SELECT count(*) FROM operation`); n != 1 {
		t.Errorf("got %d operations, want 1", n)
	}
}

func TestConcurrentSubmitsOfOneKeyAreOneOperation(t *testing.T) {
	t.Parallel()
	b := setup(t, WorkerConfig{})
	var mu sync.Mutex
	names := map[string]int{}
	var callers sync.WaitGroup
	for range 8 {
		callers.Go(func() {
			name, err := submit(t.Context(), b.client, probe.Mutate, "text", keyHeader, "key")
			if err != nil {
				t.Error(err)
			}
			mu.Lock()
			defer mu.Unlock()
			names[name]++
		})
	}
	callers.Wait()
	b.deliver(t)
	if len(names) != 1 {
		t.Errorf("got operations %v, want one", names)
	}
	b.wantEffects(t, "text")
}

func TestSubmitIsPartOfItsTransaction(t *testing.T) {
	t.Parallel()
	b := setup(t, WorkerConfig{})
	ctx := context.WithValue(t.Context(), callerKey{}, "alice")
	call := Call{Procedure: probe.Mutate.Procedure, Request: wrapperspb.String("staged")}
	errRolledBack := errors.New("rolled back")
	var name string
	stage := func(outcome error) error {
		return b.out.Transact(ctx, func(tx pgx.Tx) (err error) {
			if name, err = b.calls.Submit(ctx, tx, call); err != nil {
				return err
			}
			return outcome
		})
	}
	if err := stage(errRolledBack); !errors.Is(err, errRolledBack) {
		t.Fatal(err)
	}
	_, err := b.GetOperation(as(t.Context(), "alice"), &operationsv1.GetOperationRequest{Name: name})
	wantCode(t, err, connect.CodeNotFound)
	if err := stage(nil); err != nil {
		t.Fatal(err)
	}
	b.deliver(t)
	b.wantState(t, name, succeeded, "did staged")
	for name, call := range map[string]Call{
		"other type": {Procedure: probe.Mutate.Procedure, Request: wrapperspb.Int32(1)},
		"no method":  {Procedure: "/no.Service/Method", Request: wrapperspb.String("")},
		"no service": {Procedure: "", Request: wrapperspb.String("")},
		"bad key":    {Procedure: probe.Mutate.Procedure, Request: wrapperspb.String(""), Key: "\x00"},
	} {
		err := b.out.Transact(ctx, func(tx pgx.Tx) error {
			_, err := b.calls.Submit(ctx, tx, call)
			return err
		})
		if code := connect.CodeOf(err); code != connect.CodeInvalidArgument && code != connect.CodeUnimplemented {
			t.Errorf("%s: got error %v", name, err)
		}
	}
}

// An error of the handler is the result. It undoes everything that the call did, including its transactions before the
// error.
func TestAnErrorIsAResult(t *testing.T) {
	t.Parallel()
	b := setup(t, WorkerConfig{})
	detail, err := connectproto.NewErrorDetail(durationpb.New(5))
	if err != nil {
		t.Fatal(err)
	}
	for text, test := range map[string]struct {
		act  act
		want string
	}{
		"connect": {fails(connect.NewError(connect.CodeNotFound, "gone").WithDetail(detail)), "not_found: gone"},
		"other":   {fails(errors.New("secret")), "internal: internal error"},
		"panic":   {func(context.Context, *outbox.Writer) error { panic("secret") }, "internal: internal error"},
		"in a transaction": {func(ctx context.Context, out *outbox.Writer) error {
			return out.Transact(ctx, func(tx pgx.Tx) error {
				_, err := tx.Exec(ctx, `SELECT 1 / 0`)
				return err
			})
		}, "internal: internal error"},
		"swallowed in a transaction": {func(ctx context.Context, out *outbox.Writer) error {
			return out.Transact(ctx, func(tx pgx.Tx) error {
				_, _ = tx.Exec(ctx, `SELECT 1 / 0`)
				return nil
			})
		}, "internal: internal error"},
		"behind a transaction": {func(ctx context.Context, out *outbox.Writer) error {
			err := out.Transact(ctx, func(tx pgx.Tx) error {
				if _, err := tx.Exec(ctx, `INSERT INTO effects (text) VALUES ('undone')`); err != nil {
					return err
				}
				return outbox.Insert(ctx, tx, messaging.New("k", wrapperspb.String("undone")))
			})
			return errors.Join(err, connect.NewError(connect.CodeFailedPrecondition, "no"))
		}, "failed_precondition: no"},
		"another service": {
			fails(connect.NewError(connect.CodeNotFound, "secret").WithDetail(detail).WithRemote()), "internal: internal error",
		},
		"resource": {fails(connect.NewError(connect.CodeResourceExhausted, "yours")), "resource_exhausted: yours"},
	} {
		b.on(text, test.act)
		name := b.submit(t, text)
		b.deliver(t)
		got := b.wantState(t, name, failed, test.want)
		if runs, _ := b.ran(text); runs != 1 {
			t.Errorf("%s: ran %d times", text, runs)
		}
		if text == "connect" {
			var delay durationpb.Duration
			details := got.GetError().GetDetails()
			if len(details) != 1 || (*anypb.Any)(details[0]).UnmarshalTo(&delay) != nil || delay.GetNanos() != 5 {
				t.Errorf("got details %v", details)
			}
		}
	}
	b.wantEffects(t)
	if n := b.count(t, `SELECT count(*) FROM outbox WHERE type = 'google.protobuf.StringValue'`); n != 0 {
		t.Errorf("failed calls have sent %d messages", n)
	}
}

func TestTransientErrorsAreRetried(t *testing.T) {
	t.Parallel()
	b := setup(t, WorkerConfig{})
	for text, err := range map[string]error{
		"unavailable": connect.NewError(connect.CodeUnavailable, "later"),
		"aborted":     connect.NewError(connect.CodeAborted, "later"),
		"unknown":     postgres.ErrOutcomeUnknown,
		"backlog":     outbox.ErrBacklogFull,
		"limited":     connect.NewError(connect.CodeResourceExhausted, "by another service").WithRemote(),
		"too slow":    connect.NewError(connect.CodeDeadlineExceeded, "of another service").WithRemote(),
	} {
		b.on(text, fails(err), fails(err), fails(nil))
		name := b.submit(t, text)
		b.deliver(t)
		if got := b.wantState(t, name, succeeded, "did "+text); got.GetAttempts() != 3 {
			t.Errorf("%s: got %d attempts, want 3", text, got.GetAttempts())
		}
	}
	if n := b.count(t, `SELECT count(*) FROM effects`); n != 6 {
		t.Errorf("got %d effects of 6 calls", n)
	}
}

// If a worker begins a call but the answer of the commit is lost, the call does not run and this is no attempt.
func TestABeginWithoutAnAnswerIsNoAttempt(t *testing.T) {
	t.Parallel()
	b := setup(t, WorkerConfig{})
	b.on("call", fails(connect.NewError(connect.CodeUnavailable, "later")), fails(nil))
	name := b.submit(t, "call")
	lose := func() {
		for range 3 {
			if _, err := b.worker.begin(t.Context(), strings.TrimPrefix(name, namePrefix)); err != nil {
				t.Fatal(err)
			}
		}
	}
	lose()
	if err := b.worker.Process(t.Context(), b.messages(t)); err != nil {
		t.Fatal(err)
	}
	lose()
	if got := b.get(t, name).GetAttempts(); got != 1 {
		t.Errorf("got %d attempts, want 1", got)
	}
	b.deliver(t)
	if got := b.wantState(t, name, succeeded, "did call").GetAttempts(); got != 2 {
		t.Errorf("got %d attempts, want 2", got)
	}
}

func TestWhatIsGivenUpHasAResult(t *testing.T) {
	t.Parallel()
	b := setup(t, WorkerConfig{})
	b.on("never", fails(connect.NewError(connect.CodeUnavailable, "never")))
	exhausted := b.submit(t, "never")
	b.deliver(t)
	if got := b.wantState(t, exhausted, failed, "unavailable: never"); got.GetAttempts() != 3 {
		t.Errorf("got %d attempts, want 3", got.GetAttempts())
	}

	b.on("needs another", fails(connect.NewError(connect.CodeUnavailable, "dial tcp 10.0.0.7:80: refused").WithRemote()))
	behind := b.submit(t, "needs another")
	b.deliver(t)
	b.wantState(t, behind, failed,
		"unavailable: a service that this one calls is unavailable, try again with the same ID")

	crashed := b.submit(t, "crashes")
	killer := b.messages(t)
	killer[0].Count = 2 // its earlier deliveries were interrupted, so the inbox moves it to inbox_retry
	if err := b.worker.Process(t.Context(), killer); err != nil {
		t.Fatal(err)
	}
	b.exec(t, `UPDATE inbox_retry SET runs = array_fill(gen_random_uuid(), '{9}')`)
	b.deliver(t)
	b.wantState(t, crashed, failed, "internal: given up: the call did not complete")

	undelivered := b.submit(t, "undelivered")
	if err := b.worker.Drain(t.Context(), b.messages(t)); err != nil {
		t.Fatal(err)
	}
	b.wantState(t, undelivered, failed, "unavailable: given up: no worker executed the call in time")

	b.wantEffects(t)
	if n := b.count(t, `SELECT count(*) FROM dead_letter`); n != 4 {
		t.Errorf("got %d dead letters, want 4", n)
	}
}
