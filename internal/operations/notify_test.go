package operations

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	"connectrpc.com/connect/v2"
	"connectrpc.com/connect/v2/connectinprocess"
	"example.com/shop/internal/deadletter"
	"example.com/shop/internal/dev/probe"
	operationsv1 "example.com/shop/internal/gen/shop/operations/v1"
	"example.com/shop/internal/gen/shop/operations/v1/operationsv1connect"
	"example.com/shop/internal/outbox"
	"example.com/shop/internal/unary"
	"github.com/jackc/pgx/v5"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// submitIn submits a call as alice in a transaction of its own, with its text as notify key, and then fails with err.
func (b *bundle) submitIn(t *testing.T, text string, err error) (name string) {
	t.Helper()
	ctx := context.WithValue(t.Context(), callerKey{}, "alice")
	got := b.out.Transact(t.Context(), func(tx pgx.Tx) (failed error) {
		name, failed = b.calls.Submit(ctx, tx, Call{
			Procedure: probe.Mutate.Procedure, Request: wrapperspb.String(text), NotifyKey: text[:min(len(text), 20)],
		})
		return errors.Join(failed, err)
	})
	if !errors.Is(got, err) {
		t.Fatal(got)
	}
	return name
}

// wantEnded checks the messages OperationEnded in the outbox, as "key state result", sorted.
func (b *bundle) wantEnded(t *testing.T, want ...string) {
	t.Helper()
	rows, _ := b.db.Query(t.Context(), `
		SELECT key, payload FROM outbox WHERE type = 'shop.operations.v1.OperationEnded' ORDER BY key`)
	got, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (string, error) {
		var key string
		var payload []byte
		var ended operationsv1.OperationEnded
		if err := errors.Join(row.Scan(&key, &payload), proto.Unmarshal(payload, &ended)); err != nil {
			return "", err
		}
		result := resultOf(t, ended.GetOperation())
		if ended.GetResponseOmitted() {
			result = "omitted"
		}
		return fmt.Sprintf("%s %s %s", key, stateText(ended.GetOperation().GetState()), result), nil
	})
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("got %q, %v, want %q", got, err, want)
	}
}

// However a call ends, the handler that submitted it gets one message with the result, if its transaction committed.
func TestASubmitterIsNotifiedOnce(t *testing.T) {
	t.Parallel()
	b := setup(t, WorkerConfig{})
	away := func(context.Context, *outbox.Writer) error {
		return connect.NewError(connect.CodeUnavailable, "not now")
	}
	b.on("b fails", fails(connect.NewError(connect.CodeFailedPrecondition, "no stock")))
	b.on("c fails at first", away, nil)
	b.on("d is given up", away)
	succeeded := b.submitIn(t, "a succeeds", nil)
	for _, text := range []string{"b fails", "c fails at first", "d is given up"} {
		b.submitIn(t, text, nil)
	}
	cancelled := b.submitIn(t, "e is cancelled", nil)
	b.submitIn(t, "f is rolled back", errors.New("changed its mind"))
	large := strings.Repeat("g", maxResponse)
	b.submitIn(t, large, nil)
	b.submit(t, "without a key")
	_, err := b.CancelOperation(as(t.Context(), "alice"), &operationsv1.CancelOperationRequest{Name: cancelled})
	if err != nil {
		t.Fatal(err)
	}
	b.wantEnded(t)
	b.deliver(t)
	want := []string{
		"a succeeds succeeded did a succeeds", "b fails failed failed_precondition: no stock",
		"c fails at first succeeded did c fails at first", "d is given up failed unavailable: not now",
		"e is cancelled cancelled " + resultOf(t, b.get(t, cancelled)), large[:20] + " succeeded omitted",
	}
	b.wantEnded(t, want...)

	// A copy that arrives after the inbox has forgotten the message becomes a dead letter.
	id := strings.TrimPrefix(succeeded, namePrefix)
	letter := deadletter.Letter{MessageID: id, Payload: encode(&operationsv1.OperationSubmitted{
		OperationId: id, Method: methodName(probe.Mutate.Procedure), NotifyKey: "a succeeds",
	})}
	err = b.out.Transact(t.Context(), func(tx pgx.Tx) error { return b.worker.giveUp(t.Context(), tx, letter) })
	if err != nil {
		t.Fatal(err)
	}
	b.wantEnded(t, want...)
}

// A method that takes no Idempotency-Key would refuse it, so only the others get one.
func TestForwardSendsAKeyOnlyIfTheMethodTakesIt(t *testing.T) {
	t.Parallel()
	other := connect.NewServer()
	got := map[string]string{}
	for procedure, empty := range map[string]proto.Message{
		probe.Mutate.Procedure: &wrapperspb.StringValue{},
		operationsv1connect.OperationServiceCancelOperationProcedure: &operationsv1.CancelOperationResponse{},
	} {
		other.Register(connect.Method{
			Spec: connect.Spec{Procedure: procedure},
			Handler: func(ctx context.Context, _ connect.Spec, stream connect.ServerStream) error {
				info, _ := connect.CallInfoForServerContext(ctx)
				got[procedure] = info.RequestHeader().Get(keyHeader)
				return stream.Send(empty)
			},
		})
	}
	client, server := connect.NewClient(connectinprocess.New(other)), connect.NewServer()
	for _, service := range []string{"probe.durable.v1.Probe", operationsv1connect.OperationServiceName} {
		if err := Forward(server, client, service); err != nil {
			t.Fatal(err)
		}
	}
	for spec := range server.Specs() {
		method, _ := unary.Describe(spec)
		info := &connect.CallInfo{Spec: spec}
		stream := &unary.Stream{Request: unary.New(method.Input())}
		// Only two of the methods exist there.
		ctx := context.WithValue(t.Context(), nameKey{}, "operations/1")
		err := server.Call(ctx, spec.Procedure, info, stream)
		if err != nil && connect.CodeOf(err) != connect.CodeUnimplemented {
			t.Errorf("%s: %v", spec.Procedure, err)
		}
	}
	want := map[string]string{
		probe.Mutate.Procedure: "operations/1", operationsv1connect.OperationServiceCancelOperationProcedure: "",
	}
	if !maps.Equal(got, want) {
		t.Errorf("got keys %q, want %q", got, want)
	}
}

func TestANotifyKeyIsChecked(t *testing.T) {
	t.Parallel()
	for _, key := range []string{strings.Repeat("k", 256), "\x00", "\xff"} {
		call := Call{Procedure: probe.Mutate.Procedure, Request: wrapperspb.String(""), NotifyKey: key}
		wantCode(t, submittable(call), connect.CodeInvalidArgument)
	}
}
