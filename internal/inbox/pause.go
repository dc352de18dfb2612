package inbox

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"example.com/orders/internal/postgres"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
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
	var refused *pgconn.PgError
	switch {
	case errors.As(err, &refused) && refused.Code == "55P03": // lock_not_available
		return nil, ErrBeingTried
	case err != nil:
		return nil, fmt.Errorf("bury messages: %w", err)
	}
	return messageIDs, nil
}

// Standing is how a consumer group stands.
type Standing struct {
	Consumer string
	// Paused says who paused it and why; nil if nobody did.
	Paused *PausedBy
	// Processes is how many have it running; a paused one counts. Applied is what each has applied since it began, by its name.
	Applied map[string]int64
	// Lag is the age in seconds that the message had which was applied last, of all processes the largest; nil before the first.
	Lag *float64
	// Retrying are the messages in inbox_retry, Blocked the keys among them whose messages wait for the first, and Oldest the seconds that the
	// oldest of the messages has waited.
	Retrying, Blocked int64
	Oldest            float64
}

// PausedBy is a pause.
type PausedBy struct {
	Actor, Reason string
	At            time.Time
}

const standingsSQL = `
SELECT name, pause.actor, pause.reason, pause.paused_at, coalesce(alive.applied, '{}'), alive.lag,
    coalesce(retry.messages, 0), coalesce(retry.keys, 0), coalesce(retry.oldest, 0)
FROM unnest($1::text[]) WITH ORDINALITY AS wanted (name, position)
LEFT JOIN inbox_pause AS pause ON pause.consumer = name
LEFT JOIN LATERAL (
    SELECT jsonb_object_agg(owner, applied) AS applied, max(lag) AS lag
    FROM inbox_consumer WHERE consumer = name AND expires_at > clock_timestamp()) AS alive ON true
LEFT JOIN LATERAL (
    SELECT count(*) AS messages, count(DISTINCT key) FILTER (WHERE key <> '') AS keys,
        extract(epoch FROM clock_timestamp() - min(created_at))::float8 AS oldest
    FROM inbox_retry WHERE consumer = name) AS retry ON true
ORDER BY position`

// Standings returns how consumer groups stand, in the order given.
func Standings(ctx context.Context, db *pgxpool.Pool, groups []string) ([]Standing, error) {
	rows, err := db.Query(ctx, standingsSQL, groups)
	if err != nil {
		return nil, fmt.Errorf("read consumer groups: %w", err)
	}
	found, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (s Standing, err error) {
		var actor, reason *string
		var at *time.Time
		err = row.Scan(&s.Consumer, &actor, &reason, &at, &s.Applied, &s.Lag, &s.Retrying, &s.Blocked, &s.Oldest)
		if at != nil {
			s.Paused = &PausedBy{*actor, *reason, *at}
		}
		return s, err
	})
	if err != nil {
		return nil, fmt.Errorf("read consumer groups: %w", postgres.Classify(err))
	}
	return found, nil
}
