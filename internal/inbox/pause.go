package inbox

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"example.com/shop/internal/postgres"
	"github.com/jackc/pgx/v5"
)

// WhileResumed runs part until ctx is done. When operators pause the group, it cancels the context of part; when they
// resume the group, it runs part again. On cancellation, part must finish the work that it has begun, so that a paused
// group has no deliveries in progress and the rest stays in the queue. WhileResumed polls the state of the group every
// PollInterval. While the database does not answer, the last known state applies.
func (b *Inbox) WhileResumed(ctx context.Context, part func(ctx context.Context) error) error {
	for paused := false; ctx.Err() == nil; {
		if paused = b.isPaused(ctx, paused); paused {
			b.wait(ctx)
			continue
		}
		if err := b.untilPaused(ctx, part); err != nil {
			return err
		}
		paused = true // or ctx is done
	}
	return nil
}

// untilPaused runs part until the group is paused or ctx is done, and waits for part to end.
func (b *Inbox) untilPaused(ctx context.Context, part func(ctx context.Context) error) error {
	ctx, cancel := context.WithCancel(ctx)
	var watching sync.WaitGroup
	defer watching.Wait()
	defer cancel()
	watching.Go(func() {
		for ctx.Err() == nil {
			if b.isPaused(ctx, false) {
				slog.InfoContext(ctx, "group paused by an operator", "consumer", b.group.name)
				cancel()
			}
			b.wait(ctx)
		}
	})
	return part(ctx)
}

func (b *Inbox) isPaused(ctx context.Context, otherwise bool) (paused bool) {
	err := b.db.QueryRow(ctx, `SELECT EXISTS (SELECT FROM inbox_pause WHERE consumer = $1)`, b.group.name).Scan(&paused)
	if err != nil {
		return otherwise
	}
	return paused
}

func (b *Inbox) wait(ctx context.Context) {
	select {
	case <-ctx.Done():
	case <-time.After(b.config.PollInterval):
	}
}

const pauseSQL = `INSERT INTO inbox_pause (consumer, actor, reason) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING`

// Pause stops a group from taking deliveries and from retrying messages, as part of tx. It returns false if the group
// is already paused.
func Pause(ctx context.Context, tx pgx.Tx, consumer, actor, reason string) (bool, error) {
	tag, err := tx.Exec(ctx, pauseSQL, consumer, actor, reason)
	if err != nil {
		return false, fmt.Errorf("pause group: %w", err)
	}
	return tag.RowsAffected() > 0, nil
}

// Resume ends a pause, as part of tx. It returns false if the group is not paused.
func Resume(ctx context.Context, tx pgx.Tx, consumer string) (bool, error) {
	tag, err := tx.Exec(ctx, `DELETE FROM inbox_pause WHERE consumer = $1`, consumer)
	if err != nil {
		return false, fmt.Errorf("resume group: %w", err)
	}
	return tag.RowsAffected() > 0, nil
}

// ErrBeingTried means that the handler of a message is running, and may be about to succeed.
var ErrBeingTried = errors.New("the handler is running on the message right now; try again in a few seconds")

// Bury moves the first waiting message of a key to dead_letter, or all of them if whole is set, as part of tx. It
// returns the messages' IDs. If only the first message is moved, those behind it continue.
func Bury(
	ctx context.Context, tx pgx.Tx, consumer, key string, whole bool, cause string,
) (messageIDs []string, err error) {
	err = tx.QueryRow(ctx, `SELECT inbox_bury($1, $2, $3, $4)`, consumer, key, whole, cause).Scan(&messageIDs)
	switch {
	case postgres.IsLocked(err):
		return nil, ErrBeingTried
	case err != nil:
		return nil, fmt.Errorf("bury messages: %w", err)
	}
	return messageIDs, nil
}
