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

// WhileResumed runs part until ctx is done, except while operators have paused the group. A pause ends part's context,
// and resuming runs part again. part must finish what it has begun, so a paused group holds no deliveries, and further
// ones stay in the queue. It polls for pauses every PollInterval. While the database is away, nothing changes.
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

// untilPaused runs part until the group is paused or ctx is done, and waits until it returns.
func (b *Inbox) untilPaused(ctx context.Context, part func(ctx context.Context) error) error {
	ctx, cancel := context.WithCancel(ctx)
	var watching sync.WaitGroup
	defer watching.Wait()
	defer cancel()
	watching.Go(func() {
		for ctx.Err() == nil {
			if b.isPaused(ctx, false) {
				slog.InfoContext(ctx, "group is paused by an operator", "consumer", b.group.name)
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

// Pause stops a group's deliveries and retries, in tx. It returns false if the group is already paused.
func Pause(ctx context.Context, tx pgx.Tx, consumer, actor, reason string) (bool, error) {
	tag, err := tx.Exec(ctx, `
		INSERT INTO inbox_pause (consumer, actor, reason) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING`,
		consumer, actor, reason)
	if err != nil {
		return false, fmt.Errorf("pause group: %w", err)
	}
	return tag.RowsAffected() > 0, nil
}

// Resume ends a pause, in tx. It returns false if the group is not paused.
func Resume(ctx context.Context, tx pgx.Tx, consumer string) (bool, error) {
	tag, err := tx.Exec(ctx, `DELETE FROM inbox_pause WHERE consumer = $1`, consumer)
	if err != nil {
		return false, fmt.Errorf("resume group: %w", err)
	}
	return tag.RowsAffected() > 0, nil
}

// ErrBeingTried means that the handler of a message is running, and may succeed.
var ErrBeingTried = errors.New("the message is being tried at this moment; try again in a few seconds")

// Bury makes waiting messages of a key dead letters, in tx: all of them if whole is true, else the first. It returns
// their IDs. The next message of the key becomes due.
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
