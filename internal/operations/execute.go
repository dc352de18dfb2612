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

// execute executes a call in the transaction of its inbox row, and stores its result there.
func (w *Worker) execute(ctx context.Context, tx pgx.Tx, message *operationsv1.OperationSubmitted) error {
	if ctx.Value(admitted{}) == nil { // a retry, which did not go through Process
		leave, err := w.enter(ctx, message.GetMethod())
		if err != nil {
			return err
		}
		defer leave()
	}
	op, err := w.begin(ctx, message.GetOperationId())
	if errors.Is(err, pgx.ErrNoRows) { // cancelled, or deleted
		return w.notify(ctx, tx, message)
	}
	if err != nil {
		return err
	}
	if err := w.executeAs(ctx, tx, op); err != nil {
		return err
	}
	return w.notify(ctx, tx, message)
}

// executeAs executes a call that has begun as its caller, and stores its result.
func (w *Worker) executeAs(ctx context.Context, tx pgx.Tx, op signed) (err error) {
	joined := postgres.Join(ctx, w.db, tx)
	var response proto.Message
	// This nested transaction undoes everything if the call fails after one of its own transactions.
	err = postgres.Transact(joined, w.db, func(pgx.Tx) error {
		response, err = w.call(joined, op)
		return err
	})
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case err != nil && retryable(err):
		w.note(ctx, op, err)
		return err
	case err != nil:
		return w.end(ctx, tx, op, "failed", nil, encode(statusOf(err)))
	}
	result, err := anypb.New(response)
	if err != nil {
		return fmt.Errorf("encode response: %w", err)
	}
	return w.end(ctx, tx, op, "succeeded", encode(result), nil)
}

// beginSQL is committed in its own transaction, so that callers see the state while the call runs. The commit does
// not wait for the disk: a crash can lose only the displayed status. If the answer of the commit is lost, the call
// does not run although the commit may have succeeded. So the statement does not count: it sets the attempt that the
// inbox counts.
const beginSQL = `
WITH asynchronous AS MATERIALIZED (SELECT set_config('synchronous_commit', 'off', true))
UPDATE operation
SET state = 'running', attempts = greatest(attempts, $2), started_at = coalesce(started_at, clock_timestamp())
FROM asynchronous WHERE id = $1 AND state IN ('pending', 'running')
RETURNING id, caller, method, request, identity, signature`

// signed is an operation to execute, with its signature.
type signed struct {
	ticket
	signature []byte
}

// begin records that the call has begun. From then on it cannot be cancelled. begin returns pgx.ErrNoRows if the
// operation does not exist or has ended.
func (w *Worker) begin(ctx context.Context, text string) (op signed, err error) {
	id, err := uuid.Parse(text)
	if err != nil {
		return op, fmt.Errorf("operation id %q: %w", text, err)
	}
	err = postgres.Transact(ctx, w.db, func(tx pgx.Tx) error {
		w.operations.topic.Touch(tx, id.String())
		return tx.QueryRow(ctx, beginSQL, id, inbox.Attempt(ctx)).
			Scan(&op.id, &op.caller, &op.method, &op.request, &op.identity, &op.signature)
	})
	if err != nil && !errors.Is(err, pgx.ErrNoRows) {
		err = fmt.Errorf("begin operation: %w", err)
	}
	return op, err
}

// call makes the call as its caller, and returns its response.
func (w *Worker) call(ctx context.Context, op signed) (proto.Message, error) {
	config := w.operations.config
	if !config.verify(op.ticket, op.signature) {
		slog.ErrorContext(ctx, "operation not executed: invalid signature",
			"operation", op.id, "method", op.method, "caller", op.caller)
		return nil, connect.NewError(connect.CodePermissionDenied,
			"the operation was not signed by this service, or its key is no longer accepted")
	}
	asCaller, err := config.Identity.restore(ctx, op.identity)
	if err != nil {
		slog.ErrorContext(ctx, "operation not executed: stored identity of its caller cannot be restored",
			"operation", op.id, "error", err)
		return nil, connect.NewError(connect.CodeInternal, "the stored identity of the caller cannot be restored")
	}
	method, err := methodOf(op.method)
	if err != nil {
		return nil, err
	}
	stream := &unary.Stream{Request: unary.New(method.Input())}
	if err := proto.Unmarshal(op.request, stream.Request); err != nil {
		return nil, connect.NewError(connect.CodeInternal, "the stored request cannot be decoded").WithCause(err)
	}
	info := &connect.CallInfo{Protocol: "operation", Codec: connect.CodecNameProto}
	info.Spec.Procedure = "/" + op.method
	info.RequestHeader().Set(nameHeader, nameOf(op.id))
	asCaller = context.WithValue(asCaller, nameKey{}, nameOf(op.id))
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

// end stores the result. An operation has only one: if it has ended meanwhile, end returns an error, which undoes the
// effects of the call.
func (w *Worker) end(ctx context.Context, tx pgx.Tx, op signed, state string, response, failed []byte) error {
	tag, err := tx.Exec(ctx, endSQL, op.id, state, response, failed)
	if err != nil {
		return fmt.Errorf("end operation: %w", err)
	}
	if tag.RowsAffected() == 0 {
		return errors.New("operation ended during its execution")
	}
	w.operations.topic.Touch(tx, op.id.String())
	return nil
}

// maxResponse is the largest response in bytes in a message OperationEnded, half of the largest message.
const maxResponse = messaging.MaxPayload / 2

// notify sends OperationEnded of a call that has ended, if its submit asked for that. The inbox applies the message of
// the call once, so notify runs once.
func (w *Worker) notify(ctx context.Context, tx pgx.Tx, message *operationsv1.OperationSubmitted) error {
	if message.GetNotifyKey() == "" {
		return nil
	}
	id, err := uuid.Parse(message.GetOperationId())
	if err != nil {
		return fmt.Errorf("operation id %q: %w", message.GetOperationId(), err)
	}
	rows, _ := tx.Query(ctx, readSQL, []string{id.String()})
	op, err := pgx.CollectExactlyOneRow(rows, scan)
	if errors.Is(err, pgx.ErrNoRows) {
		return nil // deleted long after its end
	}
	if err != nil {
		return fmt.Errorf("read ended operation: %w", err)
	}
	ended := &operationsv1.OperationEnded{Operation: op}
	if len(op.GetResponse().GetValue()) > maxResponse {
		op.Result, ended.ResponseOmitted = nil, true
	}
	return outbox.Insert(ctx, tx, messaging.New(message.GetNotifyKey(), ended))
}

const noteSQL = `
WITH asynchronous AS MATERIALIZED (SELECT set_config('synchronous_commit', 'off', true))
UPDATE operation SET error = $2 FROM asynchronous WHERE id = $1 AND state = 'running'`

// note stores the error of an attempt, in case it was the last one. It does not use the transaction of the call, which
// will be rolled back.
func (w *Worker) note(ctx context.Context, op signed, failed error) {
	if _, err := w.db.Exec(ctx, noteSQL, op.id, encode(statusOf(failed))); err != nil {
		slog.WarnContext(ctx, "error of an attempt not stored", "operation", op.id, "error", err)
	}
}

// retryable reports whether another attempt may succeed.
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
		panic("operations: " + err.Error()) // cannot happen: all texts are valid UTF-8
	}
	return messaging.NotNil(text)
}

// statusOf returns err as a caller would have seen it.
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
