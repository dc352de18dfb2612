package operations

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"example.com/shop/internal/deadletter"
	operationsv1 "example.com/shop/internal/gen/shop/operations/v1"
	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
)

// Ended resolves the dead letter of a durable call that has ended; see ops.Group. Executing the call again would change
// nothing, because its caller has the result and the request is erased. Ended returns "" if the call has not ended, so
// that its message may continue.
func Ended(ctx context.Context, tx pgx.Tx, letter deadletter.Stored) (deadletter.Resolution, string, error) {
	state, err := stateOf(ctx, tx, letter.MessageID)
	switch {
	case err != nil:
		return "", "", err
	case state == operationsv1.OperationState_OPERATION_STATE_UNSPECIFIED:
		return "", "", errors.New("its durable call is unknown or was deleted; discard it")
	case state == operationsv1.OperationState_OPERATION_STATE_SUCCEEDED:
		return deadletter.Duplicate, "its durable call has succeeded", nil
	case state == operationsv1.OperationState_OPERATION_STATE_FAILED,
		state == operationsv1.OperationState_OPERATION_STATE_CANCELLED:
		return "", "", fmt.Errorf("its durable call has ended as %s, and its caller has that result: "+
			"only the caller can submit it again, without the old idempotency key; discard it",
			strings.ToLower(strings.TrimPrefix(state.String(), "OPERATION_STATE_")))
	}
	return "", "", nil
}

// stateOf returns the state of an operation as tx sees it, by the ID of its message. If there is no such operation, it
// returns OPERATION_STATE_UNSPECIFIED.
func stateOf(ctx context.Context, tx pgx.Tx, messageID string) (operationsv1.OperationState, error) {
	const none = operationsv1.OperationState_OPERATION_STATE_UNSPECIFIED
	id, err := uuid.Parse(messageID)
	if err != nil {
		return none, nil // not the message of an operation
	}
	var state string
	err = tx.QueryRow(ctx, `SELECT state FROM operation WHERE id = $1`, id).Scan(&state)
	switch {
	case errors.Is(err, pgx.ErrNoRows):
		return none, nil
	case err != nil:
		return none, fmt.Errorf("read state of operation: %w", err)
	}
	return parseState(state), nil
}
