package console

import (
	"context"
	"strings"

	"connectrpc.com/connect/v2"
	opsv1 "example.com/shop/internal/gen/ops/v1"
	operationsv1 "example.com/shop/internal/gen/shop/operations/v1"
	"example.com/shop/internal/operations"
	"example.com/shop/internal/ops"
	"example.com/shop/internal/postgres"
	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"google.golang.org/protobuf/types/known/timestamppb"
)

const statePrefix = "OPERATION_STATE_"

// ListOperations implements ops.v1.OpsService.
func (c *Console) ListOperations(
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
	found, err := c.config.Operations.List(ctx, listing)
	if err != nil {
		return nil, publicError(err)
	}
	response := &opsv1.ListOperationsResponse{}
	if len(found) > pageRows {
		found = found[:pageRows]
		response.NextPageToken = found[pageRows-1].ID.String()
	}
	for _, o := range found {
		response.Operations = append(response.Operations, &opsv1.Operation{
			Id: o.ID.String(), Method: o.Method, Caller: o.Caller, Attempts: o.Attempts,
			State:      strings.ToLower(strings.TrimPrefix(o.State.String(), statePrefix)),
			CreateTime: o.CreateTime, StartTime: o.StartTime, EndTime: o.EndTime, Error: o.GetError().GetMessage(),
		})
	}
	return response, nil
}

// CancelOperation implements ops.v1.OpsService.
func (c *Console) CancelOperation(
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
	err = postgres.Transact(ctx, c.db, func(tx pgx.Tx) error {
		if err := c.config.Operations.CancelFor(ctx, tx, id, why.Reason); err != nil {
			return err
		}
		return ops.Record(ctx, tx, ops.Entry{Action: "cancel", Target: "operations/" + id.String(), Note: why})
	})
	return &opsv1.CancelOperationResponse{}, publicError(err)
}

// ListRelays implements ops.v1.OpsService.
func (c *Console) ListRelays(ctx context.Context, _ *opsv1.ListRelaysRequest) (*opsv1.ListRelaysResponse, error) {
	shards, err := ops.Shards(ctx, c.db)
	if err != nil {
		return nil, publicError(err)
	}
	relays, err := ops.Relays(ctx, c.db)
	if err != nil {
		return nil, publicError(err)
	}
	response := &opsv1.ListRelaysResponse{}
	for _, s := range shards {
		if !s.Drained {
			response.Shards = append(response.Shards, &opsv1.Shard{
				Shard: int32(s.Shard), Generation: int32(s.Generation), Retired: s.Retired, Owner: s.Owner, Epoch: s.Epoch,
				Backlog: s.Backlog, Lag: s.Lag, Published: s.Published, Parked: s.Parked, MoveTime: timestamppb.New(s.MovedAt),
			})
		}
	}
	for _, r := range relays {
		response.Relays = append(response.Relays, &opsv1.Relay{Owner: r.Owner, Problem: r.Problem})
	}
	return response, nil
}
