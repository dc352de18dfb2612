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

// WhileResumed runs part, and ends its context when operators have paused the group, to run it anew once they have resumed it; until ctx is done.
// What part has begun by then it finishes: so a paused group holds no deliveries, and the rest stays in the queue. Whether the group is
// paused is asked every PollInterval; while the database cannot say, it stays as it was.
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

// untilPaused runs part until the group is paused or ctx is done, and waits for its end.
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

// Pause has a group take no more deliveries and try nothing again, as part of tx. It returns false if it is paused already.
func Pause(ctx context.Context, tx pgx.Tx, consumer, actor, reason string) (bool, error) {
	tag, err := tx.Exec(ctx, `INSERT INTO inbox_pause (consumer, actor, reason) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING`, consumer, actor, reason)
	if err != nil {
		return false, fmt.Errorf("pause group: %w", err)
	}
	return tag.RowsAffected() > 0, nil
}

// Resume takes a pause back, as part of tx. It returns false if there is none.
func Resume(ctx context.Context, tx pgx.Tx, consumer string) (bool, error) {
	tag, err := tx.Exec(ctx, `DELETE FROM inbox_pause WHERE consumer = $1`, consumer)
	if err != nil {
		return false, fmt.Errorf("resume group: %w", err)
	}
	return tag.RowsAffected() > 0, nil
}

// ErrBeingTried means that the handler of a message runs at this moment, so that it may just be succeeding.
var ErrBeingTried = errors.New("the message is being tried at this moment; try again in a few seconds")

// Bury moves what waits of a key to the dead letters as part of tx: the first message, or all of them. It returns their IDs; what waited behind the
// first goes on then.
func Bury(ctx context.Context, tx pgx.Tx, consumer, key string, whole bool, cause string) (messageIDs []string, err error) {
	err = tx.QueryRow(ctx, `SELECT inbox_bury($1, $2, $3, $4)`, consumer, key, whole, cause).Scan(&messageIDs)
	switch {
	case postgres.IsLocked(err):
		return nil, ErrBeingTried
	case err != nil:
		return nil, fmt.Errorf("bury messages: %w", err)
	}
	return messageIDs, nil
}
