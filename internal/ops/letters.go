package ops

import (
	"context"
	"errors"
	"fmt"

	"example.com/shop/internal/deadletter"
	"github.com/jackc/pgx/v5"
)

// errNotOpen means that a dead letter is resolved, or that another transaction is resolving it.
var errNotOpen = errors.New("dead letter is not open")

const lockSQL = `SELECT FROM dead_letter WHERE id = $1 AND resolution IS NULL FOR UPDATE SKIP LOCKED`

// lockLetter returns an open dead letter and locks it until tx ends. It returns errNotOpen if the dead letter is
// resolved or locked by another transaction.
func lockLetter(ctx context.Context, tx pgx.Tx, id int64) (letter deadletter.Stored, err error) {
	locked, err := tx.Exec(ctx, lockSQL, id)
	if err != nil {
		return letter, fmt.Errorf("lock dead letter: %w", err)
	}
	if locked.RowsAffected() == 0 {
		return letter, errNotOpen
	}
	letter, _, err = deadletter.Get(ctx, tx, id)
	return letter, err
}

// resolveLetter resolves a dead letter that tx has locked, and records who did it and why.
func resolveLetter(
	ctx context.Context, tx pgx.Tx, id int64, resolution deadletter.Resolution, note deadletter.Note, detail string,
) error {
	_, err := tx.Exec(ctx,
		`UPDATE dead_letter SET resolution = $2, resolved_at = clock_timestamp() WHERE id = $1`, id, resolution)
	if err == nil {
		err = recordLetter(ctx, tx, id, resolution, note, detail)
	}
	if err != nil {
		return fmt.Errorf("resolve dead letter: %w", err)
	}
	return nil
}

// errNotDiscarded means that a dead letter cannot be reopened.
var errNotDiscarded = errors.New("dead letter is not discarded, and only a discard can be undone")

// reopenLetter undoes a discard in tx, and records who did it and why. A redrive cannot be undone, because its message
// has been sent.
func reopenLetter(ctx context.Context, tx pgx.Tx, id int64, note deadletter.Note) error {
	tag, err := tx.Exec(ctx, `
		UPDATE dead_letter SET resolution = NULL, resolved_at = NULL WHERE id = $1 AND resolution = 'discarded'`, id)
	switch {
	case err == nil && tag.RowsAffected() == 0:
		return errNotDiscarded
	case err == nil:
		err = recordLetter(ctx, tx, id, deadletter.Reopened, note, "")
	}
	if err != nil {
		return fmt.Errorf("reopen dead letter: %w", err)
	}
	return nil
}

func recordLetter(
	ctx context.Context, tx pgx.Tx, id int64, resolution deadletter.Resolution, note deadletter.Note, detail string,
) error {
	_, err := tx.Exec(ctx,
		`INSERT INTO dead_letter_audit (letter_id, resolution, reason, actor, detail) VALUES ($1, $2, $3, $4, $5)`,
		id, resolution, note.Reason, note.Actor, detail)
	return err
}
