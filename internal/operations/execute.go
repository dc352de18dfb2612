package operations

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"

	"connectrpc.com/connect/v2"
	"connectrpc.com/connect/v2/connectproto"
	operationsv1 "example.com/shop/internal/gen/shop/operations/v1"
	"example.com/shop/internal/inbox"
	"example.com/shop/internal/messaging"
	"example.com/shop/internal/outbox"
	"example.com/shop/internal/postgres"
	"example.com/shop/internal/unary"
	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
)

// execute executes a call in the transaction of its inbox row, and keeps its result there.
func (w *Worker) execute(ctx context.Context, tx pgx.Tx, message *operationsv1.OperationSubmitted) error {
	if ctx.Value(admitted{}) == nil { // it is tried again
		leave, err := w.enter(ctx, message.GetMethod())
		if err != nil {
			return err
		}
		defer leave()
	}
	one, err := w.begin(ctx, message.GetOperationId())
	if errors.Is(err, pgx.ErrNoRows) {
		return nil // cancelled, or it has a result
	}
	if err != nil {
		return err
	}
	joined := postgres.Join(ctx, w.db, tx)
	var response proto.Message
	// A part of its own, so that nothing is left of a call that fails behind one of its transactions.
	err = postgres.Transact(joined, w.db, func(pgx.Tx) error {
		response, err = w.call(joined, one)
		return err
	})
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case err != nil && retryable(err):
		w.note(ctx, one, err)
		return err
	case err != nil:
		return w.end(ctx, tx, one, "failed", nil, encode(statusOf(err)))
	}
	result, err := anypb.New(response)
	if err != nil {
		return fmt.Errorf("encode response: %w", err)
	}
	return w.end(ctx, tx, one, "succeeded", encode(result), nil)
}

// Committed by itself, so that it is seen while the call runs, and without waiting for the disk: the worst that can
// be lost is the look of it. It may also be committed in vain, when its answer is lost and the call does not run: so
// it sets the attempt, which the inbox knows, and counts nothing.
const beginSQL = `
WITH hasty AS MATERIALIZED (SELECT set_config('synchronous_commit', 'off', true))
UPDATE operation
SET state = 'running', attempts = greatest(attempts, $2), started_at = coalesce(started_at, clock_timestamp())
FROM hasty WHERE id = $1 AND state IN ('pending', 'running')
RETURNING id, caller, method, request, identity, signature`

// signed is an operation as it is to be executed.
type signed struct {
	ticket
	signature []byte
}

// begin records that the call is begun: from now on it cannot be cancelled. It returns pgx.ErrNoRows if there is nothing to begin.
func (w *Worker) begin(ctx context.Context, text string) (one signed, err error) {
	id, err := uuid.Parse(text)
	if err != nil {
		return one, fmt.Errorf("operation id %q: %w", text, err)
	}
	err = postgres.Transact(ctx, w.db, func(tx pgx.Tx) error {
		w.operations.topic.Touch(tx, id.String())
		return tx.QueryRow(ctx, beginSQL, id, inbox.Attempt(ctx)).
			Scan(&one.id, &one.caller, &one.method, &one.request, &one.identity, &one.signature)
	})
	if err != nil && !errors.Is(err, pgx.ErrNoRows) {
		err = fmt.Errorf("begin operation: %w", err)
	}
	return one, err
}

// call makes the call as its caller, and returns its response.
func (w *Worker) call(ctx context.Context, one signed) (proto.Message, error) {
	config := w.operations.config
	if !config.verify(one.ticket, one.signature) {
		slog.ErrorContext(ctx, "operation is not executed: its signature is wrong", "operation", one.id, "method", one.method, "caller", one.caller)
		return nil, connect.NewError(connect.CodePermissionDenied, "the operation was not signed by this service, or its key is no longer accepted")
	}
	asCaller, err := config.Identity.restore(ctx, one.identity)
	if err != nil {
		slog.ErrorContext(ctx, "operation is not executed: its caller is not understood", "operation", one.id, "error", err)
		return nil, connect.NewError(connect.CodeInternal, "the stored identity of the caller is not understood")
	}
	method, err := methodOf(one.method)
	if err != nil {
		return nil, err
	}
	stream := &unary.Stream{Request: unary.New(method.Input())}
	if err := proto.Unmarshal(one.request, stream.Request); err != nil {
		return nil, connect.NewError(connect.CodeInternal, "the stored request cannot be decoded").WithCause(err)
	}
	info := &connect.CallInfo{Protocol: "operation", Codec: connect.CodecNameProto}
	info.Spec.Procedure = "/" + one.method
	info.RequestHeader().Set(nameHeader, nameOf(one.id))
	if err := w.server.Call(asCaller, info.Spec.Procedure, info, stream); err != nil {
		return nil, err
	}
	if stream.Response == nil {
		return nil, connect.NewError(connect.CodeInternal, "the handler has sent no response")
	}
	return stream.Response, nil
}

const endSQL = `
UPDATE operation SET state = $2, request = '', response = $3, error = $4, ended_at = clock_timestamp()
WHERE id = $1 AND state = 'running'`

// end keeps the result. It is the only one: if the operation has ended meanwhile, an error undoes what the call has done.
func (w *Worker) end(ctx context.Context, tx pgx.Tx, one signed, state string, response, failed []byte) error {
	tag, err := tx.Exec(ctx, endSQL, one.id, state, response, failed)
	if err != nil {
		return fmt.Errorf("end operation: %w", err)
	}
	if tag.RowsAffected() == 0 {
		return errors.New("the operation has ended while it was executed")
	}
	w.operations.topic.Touch(tx, one.id.String())
	return nil
}

const noteSQL = `
WITH hasty AS MATERIALIZED (SELECT set_config('synchronous_commit', 'off', true))
UPDATE operation SET error = $2 FROM hasty WHERE id = $1 AND state = 'running'`

// note keeps the error of an attempt, for the case that it was the last one. The transaction of the call is to be rolled back, so not there.
func (w *Worker) note(ctx context.Context, one signed, failed error) {
	if _, err := w.db.Exec(ctx, noteSQL, one.id, encode(statusOf(failed))); err != nil {
		slog.WarnContext(ctx, "error of an attempt not kept", "operation", one.id, "error", err)
	}
}

// retryable tells whether another try may end otherwise.
func retryable(err error) bool {
	switch connect.CodeOf(err) {
	case connect.CodeUnavailable, connect.CodeAborted:
		return true
	}
	return errors.Is(err, outbox.ErrBacklogFull)
}

func encode(message proto.Message) []byte {
	text, err := proto.Marshal(message)
	if err != nil {
		panic("operations: " + err.Error()) // texts are cleaned before
	}
	return messaging.NotNil(text)
}

// statusOf returns what a caller would have seen of err.
func statusOf(err error) *operationsv1.Status {
	var known *connect.Error
	if !errors.As(err, &known) {
		known = connect.NewError(connect.CodeInternal, "internal error")
	}
	status := &operationsv1.Status{Code: int32(known.Code()), Message: strings.ToValidUTF8(known.Message(), "\uFFFD")}
	for _, detail := range known.Details() {
		status.Details = append(status.Details, connectproto.ErrorDetailToAny(detail))
	}
	return status
}
