package operations

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"strings"
	"time"

	"connectrpc.com/connect/v2"
	"example.com/shop/internal/changes"
	operationsv1 "example.com/shop/internal/gen/shop/operations/v1"
	"example.com/shop/internal/gen/shop/operations/v1/operationsv1connect"
	"example.com/shop/internal/postgres"
	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/timestamppb"
)

var _ operationsv1connect.OperationServiceHandler = (*Operations)(nil)

// Register serves shop.operations.v1.OperationService.
func (o *Operations) Register(server *connect.Server) {
	operationsv1connect.RegisterOperationServiceHandler(server, o)
}

const columns = `id, method, state, attempts, response, error, created_at, started_at, ended_at`

const getSQL = `SELECT ` + columns + ` FROM operation WHERE id = $1 AND caller = $2`

// querier is a pool or a transaction.
type querier interface {
	Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error)
}

// find returns an operation of the caller. The operations of other callers are not found.
func (o *Operations) find(ctx context.Context, in querier, name string) (*operationsv1.Operation, error) {
	id, err := parseName(name)
	if err != nil {
		return nil, err
	}
	rows, _ := in.Query(ctx, getSQL, id, o.config.Identity.Caller(ctx))
	found, err := pgx.CollectExactlyOneRow(rows, scan)
	if errors.Is(err, pgx.ErrNoRows) {
		return nil, errNotFound(name)
	}
	if err != nil {
		return nil, postgres.Classify(fmt.Errorf("read operation: %w", err))
	}
	return found, nil
}

const readSQL = `SELECT ` + columns + ` FROM operation WHERE id = ANY ($1::uuid[])`

// read is the changes.Read of operations, by their IDs.
func (o *Operations) read(ctx context.Context, ids []string) (map[string]*operationsv1.Operation, error) {
	rows, _ := o.db.Query(ctx, readSQL, ids)
	found, err := pgx.CollectRows(rows, scan)
	if err != nil {
		return nil, postgres.Classify(fmt.Errorf("read operations: %w", err))
	}
	states := make(map[string]*operationsv1.Operation, len(found))
	for _, op := range found {
		states[strings.TrimPrefix(op.GetName(), namePrefix)] = op
	}
	return states, nil
}

// GetOperation implements shop.operations.v1.OperationService.
func (o *Operations) GetOperation(
	ctx context.Context, req *operationsv1.GetOperationRequest,
) (*operationsv1.GetOperationResponse, error) {
	found, err := o.find(ctx, o.db, req.GetName())
	if err != nil {
		return nil, err
	}
	return &operationsv1.GetOperationResponse{Operation: found}, nil
}

// waitTime is the default timeout of WaitOperation. It and the largest timeout are shorter than the time that a server
// that shuts down grants to running calls.
const waitTime = 10 * time.Second

// WaitOperation implements shop.operations.v1.OperationService.
func (o *Operations) WaitOperation(
	ctx context.Context, req *operationsv1.WaitOperationRequest,
) (*operationsv1.WaitOperationResponse, error) {
	timeout := waitTime
	if req.GetTimeout() != nil {
		timeout = req.GetTimeout().AsDuration()
	}
	last, err := o.find(ctx, o.db, req.GetName())
	if err != nil {
		return nil, err
	}
	limited, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	err = o.follow(limited, last, func(now *operationsv1.Operation) error { last = now; return nil })
	if err != nil && (ctx.Err() != nil || limited.Err() == nil) {
		return nil, err
	}
	return &operationsv1.WaitOperationResponse{Operation: last}, nil
}

// WatchOperation implements shop.operations.v1.OperationService.
func (o *Operations) WatchOperation(
	ctx context.Context, req *operationsv1.WatchOperationRequest,
	stream operationsv1connect.OperationServiceWatchOperationServerStream,
) error {
	first, err := o.find(ctx, o.db, req.GetName())
	if err != nil {
		return err
	}
	return o.follow(ctx, first, func(now *operationsv1.Operation) error {
		return stream.Send(&operationsv1.WatchOperationResponse{Operation: now})
	})
}

// follow calls see with the last known state of an operation and with each later state, until the operation has ended.
// The read of the first state has checked that the operation is the caller's.
func (o *Operations) follow(
	ctx context.Context, last *operationsv1.Operation, see func(*operationsv1.Operation) error,
) error {
	if err := see(last); err != nil || ended(last) {
		return err
	}
	for now, err := range o.topic.Watch(ctx, strings.TrimPrefix(last.GetName(), namePrefix)) {
		switch {
		case errors.Is(err, changes.ErrNotFound):
			return errNotFound(last.GetName())
		case err != nil:
			return err
		case proto.Equal(now, last): // unchanged since find
			continue
		}
		last = now
		if err := see(last); err != nil || ended(last) {
			return err
		}
	}
	return ctx.Err()
}

func ended(o *operationsv1.Operation) bool { return o.GetEndTime() != nil }

const listSQL = `
SELECT id, method, state, attempts, NULL::bytea, error, created_at, started_at, ended_at
FROM operation
WHERE caller = $1
  AND ($2::text IS NULL OR state = $2)
  AND ($3::text IS NULL OR method = $3)
  AND ($4::uuid IS NULL OR id < $4)
ORDER BY id DESC LIMIT $5`

// ListOperations implements shop.operations.v1.OperationService.
func (o *Operations) ListOperations(
	ctx context.Context, req *operationsv1.ListOperationsRequest,
) (*operationsv1.ListOperationsResponse, error) {
	size := int(req.GetPageSize())
	if size == 0 {
		size = 50
	}
	var state, method *string
	if req.GetState() != operationsv1.OperationState_OPERATION_STATE_UNSPECIFIED {
		state = proto.String(stateText(req.GetState()))
	}
	if req.GetMethod() != "" {
		method = proto.String(methodName(req.GetMethod()))
	}
	before, err := parsePageToken(req.GetPageToken())
	if err != nil {
		return nil, err
	}
	rows, _ := o.db.Query(ctx, listSQL, pgx.QueryExecModeCacheDescribe,
		o.config.Identity.Caller(ctx), state, method, before, size+1)
	found, err := pgx.CollectRows(rows, scan)
	if err != nil {
		return nil, postgres.Classify(fmt.Errorf("list operations: %w", err))
	}
	if len(found) <= size {
		return &operationsv1.ListOperationsResponse{Operations: found}, nil
	}
	return &operationsv1.ListOperationsResponse{Operations: found[:size], NextPageToken: pageToken(found[size-1])}, nil
}

// pageToken encodes the ID of the last operation of a page.
func pageToken(last *operationsv1.Operation) string {
	id := uuid.MustParse(strings.TrimPrefix(last.GetName(), namePrefix))
	return base64.RawURLEncoding.EncodeToString(id[:])
}

// parsePageToken returns nil for an empty token.
func parsePageToken(text string) (*uuid.UUID, error) {
	if text == "" {
		return nil, nil
	}
	token, err := base64.RawURLEncoding.DecodeString(text)
	if err != nil || len(token) != len(uuid.UUID{}) {
		return nil, connect.NewError(connect.CodeInvalidArgument, "page_token is not one that ListOperations returned")
	}
	id := uuid.UUID(token)
	return &id, nil
}

const cancelSQL = `
UPDATE operation SET state = 'cancelled', request = '', error = $3, ended_at = clock_timestamp()
WHERE id = $1 AND caller = $2 AND state = 'pending'
RETURNING ` + columns

// Listing selects operations for an operator, who sees those of all callers. Empty fields select all operations.
type Listing struct {
	State operationsv1.OperationState
	// Before is the ID of the last operation of the previous page.
	Before *uuid.UUID
	Limit  int
}

// Listed is an operation and its caller.
type Listed struct {
	*operationsv1.Operation
	ID     uuid.UUID
	Caller string
}

const listAllSQL = `
SELECT id, method, state, attempts, NULL::bytea, error, created_at, started_at, ended_at, caller
FROM operation
WHERE ($1::text IS NULL OR state = $1) AND ($2::uuid IS NULL OR id < $2)
ORDER BY id DESC LIMIT $3`

// List returns operations of all callers, the newest first and without their responses.
func (o *Operations) List(ctx context.Context, l Listing) ([]Listed, error) {
	var state *string
	if l.State != operationsv1.OperationState_OPERATION_STATE_UNSPECIFIED {
		state = proto.String(stateText(l.State))
	}
	rows, _ := o.db.Query(ctx, listAllSQL, pgx.QueryExecModeCacheDescribe, state, l.Before, l.Limit)
	found, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (listed Listed, err error) {
		listed.Operation, err = scan(withCaller{row, &listed.Caller})
		if err == nil {
			listed.ID, err = parseName(listed.Name)
		}
		return listed, err
	})
	if err != nil {
		return nil, postgres.Classify(fmt.Errorf("list operations: %w", err))
	}
	return found, nil
}

// withCaller is a row with the caller as an additional column.
type withCaller struct {
	pgx.CollectableRow
	caller *string
}

func (r withCaller) Scan(into ...any) error { return r.CollectableRow.Scan(append(into, r.caller)...) }

// ErrBegun means that an operation is not pending, or does not exist.
var ErrBegun = errors.New("only an operation that no worker has begun can be cancelled")

// CancelFor cancels an operation of any caller as part of tx, if no worker has begun it. Otherwise it returns ErrBegun.
// The operation's caller can read the reason.
func (o *Operations) CancelFor(ctx context.Context, tx pgx.Tx, id uuid.UUID, reason string) error {
	status := &operationsv1.Status{
		Code: int32(connect.CodeCanceled), Message: "cancelled by an operator: " + reason,
	}
	var done bool
	if err := tx.QueryRow(ctx, `SELECT operation_cancel($1, $2)`, id, encode(status)).Scan(&done); err != nil {
		return fmt.Errorf("cancel operation: %w", err)
	}
	if !done {
		return ErrBegun
	}
	o.topic.Touch(tx, id.String())
	return nil
}

var cancelled = &operationsv1.Status{Code: int32(connect.CodeCanceled), Message: "cancelled before it began"}

// CancelOperation implements shop.operations.v1.OperationService.
func (o *Operations) CancelOperation(
	ctx context.Context, req *operationsv1.CancelOperationRequest,
) (*operationsv1.CancelOperationResponse, error) {
	id, err := parseName(req.GetName())
	if err != nil {
		return nil, err
	}
	var done *operationsv1.Operation
	err = postgres.Transact(ctx, o.db, func(tx pgx.Tx) error {
		postgres.ConfirmReads(tx) // the operation may be cancelled already
		rows, _ := tx.Query(ctx, cancelSQL, id, o.config.Identity.Caller(ctx), encode(cancelled))
		done, err = pgx.CollectExactlyOneRow(rows, scan)
		if errors.Is(err, pgx.ErrNoRows) {
			done, err = o.cancelledBefore(ctx, tx, req.GetName())
			return err
		}
		if err == nil {
			o.topic.Touch(tx, id.String())
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	return &operationsv1.CancelOperationResponse{Operation: done}, nil
}

// cancelledBefore returns an operation that was cancelled earlier. It returns an error if the operation is in another
// state.
func (o *Operations) cancelledBefore(ctx context.Context, tx pgx.Tx, name string) (*operationsv1.Operation, error) {
	found, err := o.find(ctx, tx, name)
	if err == nil && found.GetState() != operationsv1.OperationState_OPERATION_STATE_CANCELLED {
		err = connect.Errorf(connect.CodeFailedPrecondition,
			"operation %s is %s: only an operation that has not begun can be cancelled", name,
			stateText(found.GetState()))
	}
	return found, err
}

func scan(row pgx.CollectableRow) (*operationsv1.Operation, error) {
	var (
		op               operationsv1.Operation
		id               uuid.UUID
		state            string
		response, failed []byte
		created          time.Time
		started, ended   *time.Time
	)
	err := row.Scan(&id, &op.Method, &state, &op.Attempts, &response, &failed, &created, &started, &ended)
	if err != nil {
		return nil, err
	}
	op.Name, op.State = nameOf(id), parseState(state)
	op.CreateTime = timestamppb.New(created)
	if started != nil {
		op.StartTime = timestamppb.New(*started)
	}
	if ended == nil {
		return &op, nil
	}
	op.EndTime = timestamppb.New(*ended)
	if response != nil {
		result := &anypb.Any{}
		op.Result = &operationsv1.Operation_Response{Response: result}
		return &op, proto.Unmarshal(response, result)
	}
	if op.State == operationsv1.OperationState_OPERATION_STATE_SUCCEEDED { // lists do not select the response
		return &op, nil
	}
	status := &operationsv1.Status{}
	op.Result = &operationsv1.Operation_Error{Error: status}
	return &op, proto.Unmarshal(failed, status)
}

// stateText returns a state as the table stores it: OPERATION_STATE_PENDING is "pending".
func stateText(state operationsv1.OperationState) string {
	return strings.ToLower(strings.TrimPrefix(state.String(), "OPERATION_STATE_"))
}

func parseState(text string) operationsv1.OperationState {
	return operationsv1.OperationState(operationsv1.OperationState_value["OPERATION_STATE_"+strings.ToUpper(text)])
}
