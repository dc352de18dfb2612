package console

import (
	"strings"
	"testing"

	"connectrpc.com/connect/v2"
	"example.com/shop/internal/changes"
	opsv1 "example.com/shop/internal/gen/ops/v1"
	"example.com/shop/internal/operations"
	"example.com/shop/internal/outbox"
)

func TestCancelOfAnybodysOperation(t *testing.T) {
	t.Parallel()
	f := setup(t)
	service := NewOperations(f.db, operations.New(
		f.db, outbox.NewWriter(f.db, nil, nil), changes.New(changes.Config{}), operations.Config{}))
	for _, state := range []string{"pending", "running"} {
		f.exec(t, `INSERT INTO operation
				(id, caller, idempotency_key, method, request, request_hash, identity, signature, state)
			VALUES (outbox_uuidv7(), 'apikey:bob', '', 'a.B/C', '', '', '', '', $1)`, state)
	}
	list, err := service.ListOperations(t.Context(), &opsv1.ListOperationsRequest{})
	if err != nil || len(list.GetOperations()) != 2 {
		t.Fatalf("%v, %v", list, err)
	}
	for _, o := range list.GetOperations() {
		_, err := service.CancelOperation(asAnn(t), &opsv1.CancelOperationRequest{Id: o.GetId(), Reason: "why"})
		refused := connect.CodeOf(err) == connect.CodeFailedPrecondition
		if o.GetState() == "pending" && err != nil || o.GetState() == "running" && !refused {
			t.Errorf("%s: %v", o.GetState(), err)
		}
	}
	list, err = service.ListOperations(t.Context(), &opsv1.ListOperationsRequest{State: "cancelled"})
	if err != nil || len(list.GetOperations()) != 1 || !strings.Contains(list.GetOperations()[0].GetError(), "why") {
		t.Errorf("%v, %v", list, err)
	}
	n := f.text(t, `SELECT count(*)::text FROM operator_audit WHERE action = 'cancel' AND actor = 'apikey:ann'`)
	if n != "1" {
		t.Errorf("%s audit records", n)
	}
}

// A fault appears at its station and at no other.
