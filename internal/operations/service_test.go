package operations

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect/v2"
	"example.com/shop/internal/dev/probe"
	"example.com/shop/internal/dev/testenv"
	operationsv1 "example.com/shop/internal/gen/shop/operations/v1"
	"example.com/shop/internal/outbox"
	"google.golang.org/protobuf/types/known/durationpb"
)

func TestCancelBeforeTheCallRuns(t *testing.T) {
	t.Parallel()
	b := setup(t, WorkerConfig{})
	cancel := func(name string) (*operationsv1.Operation, error) {
		response, err := b.CancelOperation(as(t.Context(), "alice"), &operationsv1.CancelOperationRequest{Name: name})
		return response.GetOperation(), err
	}
	name := b.submit(t, "cancelled")
	for range 2 {
		if got, err := cancel(name); err != nil || got.GetState() != called {
			t.Errorf("got %v, error %v", got, err)
		}
	}
	b.deliver(t)
	b.wantState(t, name, called, "canceled: cancelled before it began")
	b.wantEffects(t)

	var during error
	b.on("running", func(ctx context.Context, _ *outbox.Writer) error {
		_, during = cancel(nameIn(ctx))
		return nil
	})
	name = b.submit(t, "running")
	b.deliver(t)
	wantCode(t, during, connect.CodeFailedPrecondition)
	b.wantState(t, name, succeeded, "did running")
	_, err := cancel(name)
	wantCode(t, err, connect.CodeFailedPrecondition)
}

// nameIn returns the name of the operation that a handler executes.
func nameIn(ctx context.Context) string {
	info, _ := connect.CallInfoForServerContext(ctx)
	return info.RequestHeader().Get(nameHeader)
}

func TestOthersSeeNothing(t *testing.T) {
	t.Parallel()
	b := setup(t, WorkerConfig{})
	name := b.submit(t, "alice's")
	bob := func() context.Context { return as(t.Context(), "bob") }
	_, err := b.GetOperation(bob(), &operationsv1.GetOperationRequest{Name: name})
	wantCode(t, err, connect.CodeNotFound)
	_, err = b.WaitOperation(bob(), &operationsv1.WaitOperationRequest{Name: name})
	wantCode(t, err, connect.CodeNotFound)
	_, err = b.CancelOperation(bob(), &operationsv1.CancelOperationRequest{Name: name})
	wantCode(t, err, connect.CodeNotFound)
	stream, err := b.WatchOperation(bob(), &operationsv1.WatchOperationRequest{Name: name})
	if err == nil {
		_, err = stream.Receive()
	}
	wantCode(t, err, connect.CodeNotFound)
	list, err := b.ListOperations(bob(), &operationsv1.ListOperationsRequest{})
	if err != nil || len(list.GetOperations()) > 0 {
		t.Errorf("got list %v, error %v", list, err)
	}
	for _, wrong := range []string{"operations/", "operations/x", "operations/{00000000-0000-7000-8000-000000000000}"} {
		_, err = b.GetOperation(as(t.Context(), "alice"), &operationsv1.GetOperationRequest{Name: wrong})
		wantCode(t, err, connect.CodeNotFound)
	}
	b.wantState(t, name, pending, "")
}

// WaitOperation returns when the call has ended in any process, or at the end of its timeout.
func TestWait(t *testing.T) {
	t.Parallel()
	b := setup(t, WorkerConfig{})
	b.calls = b.newOperations(t, signing) // the worker runs in another process than the server
	b.worker = b.newWorker(WorkerConfig{})
	name := b.submit(t, "text")
	wait := func(timeout time.Duration) (*operationsv1.Operation, error) {
		request := &operationsv1.WaitOperationRequest{Name: name, Timeout: durationpb.New(timeout)}
		response, err := b.WaitOperation(as(t.Context(), "alice"), request)
		return response.GetOperation(), err
	}
	for _, timeout := range []time.Duration{0, time.Millisecond} {
		if got, err := wait(timeout); err != nil || got.GetState() != pending {
			t.Errorf("after %s: got %v, error %v", timeout, got, err)
		}
	}
	var waiting sync.WaitGroup
	for range 20 {
		waiting.Go(func() {
			if got, err := wait(15 * time.Second); err != nil || got.GetState() != succeeded {
				t.Errorf("got %v, error %v", got, err)
			}
		})
	}
	began := time.Now()
	b.deliver(t)
	waiting.Wait()
	if took := time.Since(began); took > 10*time.Second {
		t.Errorf("WaitOperation returned only after %s", took)
	}
	_, err := wait(16 * time.Second)
	wantCode(t, err, connect.CodeInvalidArgument)
}

func TestWatch(t *testing.T) {
	t.Parallel()
	b := setup(t, WorkerConfig{})
	began, finish := make(chan struct{}), make(chan struct{})
	b.on("text", func(context.Context, *outbox.Writer) error {
		close(began)
		<-finish
		return nil
	})
	name := b.submit(t, "text")
	stream, err := b.WatchOperation(as(t.Context(), "alice"), &operationsv1.WatchOperationRequest{Name: name})
	if err != nil {
		t.Fatal(err)
	}
	defer stream.Close()
	var states []operationsv1.OperationState
	next := func() bool {
		response, err := stream.Receive()
		if err == nil {
			states = append(states, response.GetOperation().GetState())
		}
		return err == nil
	}
	next()
	var working sync.WaitGroup
	working.Go(func() { b.deliver(t) })
	<-began
	next()
	close(finish)
	for next() {
	}
	working.Wait()
	if want := []operationsv1.OperationState{pending, running, succeeded}; !slices.Equal(states, want) {
		t.Errorf("saw %v, want %v", states, want)
	}
}

func TestList(t *testing.T) {
	t.Parallel()
	b := setup(t, WorkerConfig{})
	var names []string
	for i := range 5 {
		names = append(names, b.submit(t, fmt.Sprint(i)))
	}
	b.deliver(t)
	b.on("bad", fails(connect.NewError(connect.CodeNotFound, "gone")))
	names = append(names, b.submit(t, "bad"))
	b.deliver(t)
	slow, err := submit(t.Context(), b.client, probe.Slow, "slow")
	if err != nil {
		t.Fatal(err)
	}
	names = append(names, slow)
	slices.Reverse(names)
	list := func(req *operationsv1.ListOperationsRequest) (got []string, pages int) {
		for {
			page, err := b.ListOperations(as(t.Context(), "alice"), req)
			if err != nil {
				t.Fatal(err)
			}
			pages++
			for _, op := range page.GetOperations() {
				got = append(got, op.GetName())
				if op.GetResponse() != nil || op.GetState() == failed != (op.GetError() != nil) {
					t.Errorf("listed %v", op)
				}
			}
			if req.PageToken = page.GetNextPageToken(); req.PageToken == "" {
				return got, pages
			}
		}
	}
	if got, pages := list(&operationsv1.ListOperationsRequest{PageSize: 3}); !slices.Equal(got, names) || pages != 3 {
		t.Errorf("got %d pages of %v, want 3 of %v", pages, got, names)
	}
	if got, _ := list(&operationsv1.ListOperationsRequest{State: succeeded}); !slices.Equal(got, names[2:]) {
		t.Errorf("state succeeded: got %v, want %v", got, names[2:])
	}
	if got, _ := list(&operationsv1.ListOperationsRequest{Method: probe.Slow.Procedure}); !slices.Equal(got,
		names[:1]) {
		t.Errorf("method Slow: got %v, want %v", got, names[:1])
	}
	_, err = b.ListOperations(as(t.Context(), "alice"), &operationsv1.ListOperationsRequest{PageToken: "x"})
	wantCode(t, err, connect.CodeInvalidArgument)
}

// Calls over the limit of a method wait, and do not block other calls.
func TestLimitOfAMethod(t *testing.T) {
	t.Parallel()
	b := setup(t, WorkerConfig{Concurrency: 4, Limits: map[string]int{methodName(probe.Slow.Procedure): 2}})
	var mu sync.Mutex
	now, most := 0, 0
	finish := make(chan struct{})
	busy := func(context.Context, *outbox.Writer) error {
		mu.Lock()
		now++
		most = max(most, now)
		mu.Unlock()
		<-finish
		mu.Lock()
		defer mu.Unlock()
		now--
		return nil
	}
	for i := range 6 {
		b.on(fmt.Sprint(i), busy)
		if _, err := submit(t.Context(), b.client, probe.Slow, fmt.Sprint(i)); err != nil {
			t.Fatal(err)
		}
	}
	quick := b.submit(t, "quick")
	var working sync.WaitGroup
	for _, delivery := range b.messages(t) {
		working.Go(func() {
			if err := b.worker.Process(t.Context(), append(b.messages(t)[:0], delivery)); err != nil {
				t.Error(err)
			}
		})
	}
	testenv.Eventually(t, 10*time.Second, func() error {
		mu.Lock()
		defer mu.Unlock()
		if got := b.get(t, quick).GetState(); now < 2 || got != succeeded {
			return fmt.Errorf("%d slow calls run, the quick one is %s", now, got)
		}
		return nil
	})
	close(finish)
	working.Wait()
	if most != 2 {
		t.Errorf("%d calls ran at once, want 2", most)
	}
	if n := b.count(t, `SELECT count(*) FROM operation WHERE state = 'succeeded'`); n != 7 {
		t.Errorf("%d of 7 calls succeeded", n)
	}
}

func TestWhoCalledIsSigned(t *testing.T) {
	t.Parallel()
	b := setup(t, WorkerConfig{})
	for change, forge := range map[string]string{
		"another caller":   `caller = 'bob', identity = '"bob"'`,
		"another identity": `identity = '"bob"'`,
		"another request":  `request = '\x0a0178'`,
		"another method":   `method = 'probe.durable.v1.Probe/Slow'`,
		"no signature":     `signature = ''`,
	} {
		name := b.submit(t, "forged")
		b.exec(t, `UPDATE operation SET `+forge+` WHERE id = $1`, name[len(namePrefix):])
		b.deliver(t)
		b.exec(t, `UPDATE operation SET caller = 'alice' WHERE id = $1`, name[len(namePrefix):])
		if got := b.get(t, name); got.GetError().GetCode() != int32(connect.CodePermissionDenied) {
			t.Errorf("%s: got %v, want permission_denied", change, got)
		}
	}
	b.wantEffects(t)

	old := b.submit(t, "signed by the old key")
	b.calls.config.Keys = [][]byte{keyOf("second"), keyOf("first")}
	b.deliver(t)
	b.wantState(t, old, succeeded, "did signed by the old key")
	fresh := b.submit(t, "signed by the new key")
	b.calls.config.Keys = b.calls.config.Keys[:1]
	b.deliver(t)
	b.wantState(t, fresh, succeeded, "did signed by the new key")
	b.calls.config.Keys = [][]byte{keyOf("third")}
	last := b.submit(t, "signed by the third")
	b.calls.config.Keys = [][]byte{keyOf("fourth")}
	b.deliver(t)
	if got := b.get(t, last).GetError(); got.GetCode() != int32(connect.CodePermissionDenied) {
		t.Errorf("signed by a removed key: got %v, want permission_denied", got)
	}
}

func TestConfigIsChecked(t *testing.T) {
	t.Parallel()
	for name, config := range map[string]Config{
		"a short key": {Identity: testIdentity, Keys: [][]byte{keyOf("key"), []byte("short")}},
	} {
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("%s: no panic", name)
				}
			}()
			config.check()
		}()
	}
}

func TestSweepDeletesOldResults(t *testing.T) {
	t.Parallel()
	b := setup(t, WorkerConfig{Retention: time.Hour})
	old, young := b.submit(t, "old", keyHeader, "key"), b.submit(t, "young")
	b.deliver(t)
	waiting := b.submit(t, "waiting")
	b.exec(t, `UPDATE operation SET created_at = created_at - interval '1 day'`)
	b.exec(t, `UPDATE operation SET ended_at = ended_at - interval '61 min' WHERE id = $1`, old[len(namePrefix):])
	if err := b.worker.sweep(t.Context()); err != nil {
		t.Fatal(err)
	}
	b.wantState(t, young, succeeded, "did young")
	b.wantState(t, waiting, pending, "")
	_, err := b.GetOperation(as(t.Context(), "alice"), &operationsv1.GetOperationRequest{Name: old})
	wantCode(t, err, connect.CodeNotFound)
	if again := b.submit(t, "old", keyHeader, "key"); again == old {
		t.Error("its key is still stored")
	}
}
