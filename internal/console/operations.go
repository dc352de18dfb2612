package console

import (
	"context"
	"errors"
	"strings"

	"connectrpc.com/connect/v2"
	opsv1 "example.com/shop/internal/gen/ops/v1"
	operationsv1 "example.com/shop/internal/gen/shop/operations/v1"
	"example.com/shop/internal/operations"
	"example.com/shop/internal/ops"
	"example.com/shop/internal/postgres"
	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

// Operations implements ops.v1.OperationsService.
type Operations struct {
	db    *pgxpool.Pool
	calls *operations.Operations
}

// NewOperations makes an Operations for the durable calls in db.
func NewOperations(db *pgxpool.Pool, calls *operations.Operations) *Operations {
	return &Operations{db, calls}
}

const statePrefix = "OPERATION_STATE_"

// ListOperations implements ops.v1.OperationsService.
func (o *Operations) ListOperations(
	ctx context.Context, req *opsv1.ListOperationsRequest,
) (*opsv1.ListOperationsResponse, error) {
	listing := operations.Listing{Limit: pageRows + 1}
	state := operationsv1.OperationState_value[statePrefix+strings.ToUpper(req.GetState())]
	listing.State = operationsv1.OperationState(state)
	if req.GetPageToken() != "" {
		before, err := uuid.Parse(req.GetPageToken())
		if err != nil {
			return nil, connect.NewError(connect.CodeInvalidArgument, "page_token is not one that ListOperations returned")
		}
		listing.Before = &before
	}
	found, err := o.calls.List(ctx, listing)
	if err != nil {
		return nil, publicError(err)
	}
	response := &opsv1.ListOperationsResponse{}
	if len(found) > pageRows {
		found = found[:pageRows]
		response.NextPageToken = found[pageRows-1].ID.String()
	}
	for _, call := range found {
		response.Operations = append(response.Operations, &opsv1.Operation{
			Id: call.ID.String(), Method: call.Method, Caller: call.Caller, Attempts: call.Attempts,
			State:      strings.ToLower(strings.TrimPrefix(call.State.String(), statePrefix)),
			CreateTime: call.CreateTime, StartTime: call.StartTime, EndTime: call.EndTime,
			Error: call.GetError().GetMessage(),
		})
	}
	return response, nil
}

// CancelOperation implements ops.v1.OperationsService.
func (o *Operations) CancelOperation(
	ctx context.Context, req *opsv1.CancelOperationRequest,
) (*opsv1.CancelOperationResponse, error) {
	id, err := uuid.Parse(req.GetId())
	if err == nil {
		err = storable(req.GetReason())
	}
	why := note(ctx, req.GetReason())
	if err != nil || why.Reason == "" {
		return nil, connect.NewError(connect.CodeInvalidArgument, "id must be a UUID, and reason must not be empty")
	}
	err = postgres.Transact(ctx, o.db, func(tx pgx.Tx) error {
		if err := o.calls.CancelFor(ctx, tx, id, why.Reason); err != nil {
			return err
		}
		return ops.Record(ctx, tx, ops.Entry{Action: "cancel", Target: "operations/" + id.String(), Note: why})
	})
	if errors.Is(err, operations.ErrBegun) {
		return nil, connect.NewError(connect.CodeFailedPrecondition, err.Error())
	}
	return &opsv1.CancelOperationResponse{}, publicError(err)
}
