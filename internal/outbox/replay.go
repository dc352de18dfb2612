package outbox

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"time"

	"example.com/shop/internal/messaging"
	"example.com/shop/internal/postgres"
	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"golang.org/x/time/rate"
)

// ReplayFilter selects messages that are delivered and still in the log. An empty field selects all of them. Since and
// Until are times of insertion.
type ReplayFilter struct {
	Since, Until time.Time
	Types, Keys  []string
	IDs          []uuid.UUID
	// After skips the messages that an earlier replay has published.
	After Place
}

const replaySQL = `
SELECT id, message_id, type, key, payload, headers, created_at
FROM outbox JOIN outbox_cursor USING (shard)
WHERE shard = $1 AND id > $2 AND id <= $9 AND outbox_delivered(outbox_cursor, xid, id)
  AND ($3::timestamptz IS NULL OR created_at >= $3) AND ($4::timestamptz IS NULL OR created_at < $4)
  AND (cardinality($5::text[]) = 0 OR type = ANY ($5)) AND (cardinality($6::text[]) = 0 OR key = ANY ($6))
  AND (cardinality($7::uuid[]) = 0 OR message_id = ANY ($7))
ORDER BY id LIMIT $8`

const replayPage = 200

// Place is how far a replay got: it has processed the message of this shard with this ID in the log. The zero value is
// the beginning.
type Place struct {
	Shard int16
	ID    int64
}

// Replayed is the progress of a replay.
type Replayed struct {
	Published int
	// Unroutable counts the messages left out because no queue wanted them or because they are malformed.
	Unroutable int
	// Last is the place of the last message, and LastAt is when it was inserted.
	Last   Place
	LastAt time.Time
}

// Replay publishes delivered messages again, with the same IDs and in the order of the log, at most perSecond messages
// per second. Consumers that have applied a message absorb its copy. Replay leaves out messages inserted after it
// began, so that it ends even if it is slower than the service. There is no order between replayed messages and those
// that the relay publishes meanwhile. With a nil publisher, Replay only counts. It waits out failures of the database
// and the broker. It leaves out unroutable and malformed messages, and logs and counts them.
//
// It calls progress, unless that is nil, after each page. It always returns how far it got, even with an error. Another
// replay with that place as filter.After continues from there.
func Replay(
	ctx context.Context, db *pgxpool.Pool, publisher messaging.Publisher, filter ReplayFilter, perSecond float64,
	progress func(Replayed),
) (Replayed, error) {
	done := Replayed{Last: filter.After}
	page := max(1, min(replayPage, int(perSecond))) // at most a second's worth, to avoid bursts
	pace := rate.NewLimiter(rate.Limit(perSecond), page)
	pace.AllowN(time.Now(), page) // no burst at the start either
	shards, err := replayShards(ctx, db, filter.After)
	pause := newPause(time.Second)
	for len(shards) > 0 && err == nil {
		var rows []row
		leftOut := 0
		rows, err = replayRows(ctx, db, shards[0], done.Last, filter, page)
		if err == nil && publisher != nil && len(rows) > 0 {
			if err := pace.WaitN(ctx, len(rows)); err != nil {
				return done, err
			}
			leftOut, err = publishAgain(ctx, publisher, rows)
		}
		switch {
		case ctx.Err() != nil:
			return done, ctx.Err()
		case err != nil && transient(err):
			retryIn := pause.NextBackOff()
			slog.WarnContext(ctx, "replay interrupted", "error", err, "retry_in", retryIn)
			wait(ctx, nil, retryIn)
			err = nil
			continue
		case err != nil:
			return done, err
		}
		pause.Reset()
		if n := len(rows); n > 0 {
			done.Published, done.Unroutable = done.Published+n-leftOut, done.Unroutable+leftOut
			done.Last, done.LastAt = Place{shards[0].Shard, rows[n-1].id}, rows[n-1].message.CreatedAt
			if progress != nil {
				progress(done)
			}
		}
		if len(rows) < page {
			shards = shards[1:]
		}
	}
	return done, err
}

// transient reports whether a retry may succeed after err.
func transient(err error) bool {
	return !errors.Is(err, messaging.ErrRefused) &&
		(errors.Is(err, postgres.ErrUnavailable) || errors.Is(err, errBroker))
}

// replayShardsSQL returns the newest message of each shard, in the order of the shards.
const replayShardsSQL = `
SELECT shard, coalesce((SELECT max(id) FROM outbox WHERE outbox.shard = outbox_cursor.shard), 0)
FROM outbox_cursor ORDER BY generation, shard`

// replayShards returns the current ends of the shards, in the order of the shards, starting with the shard of after.
func replayShards(ctx context.Context, db *pgxpool.Pool, after Place) ([]Place, error) {
	rows, err := db.Query(ctx, replayShardsSQL)
	if err != nil {
		return nil, fmt.Errorf("read shards: %w", err)
	}
	ends, err := pgx.CollectRows(rows, pgx.RowToStructByPos[Place])
	if err != nil {
		return nil, fmt.Errorf("read shards: %w", err)
	}
	if after == (Place{}) {
		return ends, nil
	}
	i := slices.IndexFunc(ends, func(end Place) bool { return end.Shard == after.Shard })
	if i < 0 {
		return nil, fmt.Errorf("%w %d", errNoShard, after.Shard)
	}
	return ends[i:], nil
}

// errNoShard means that a place names a shard that does not exist.
var errNoShard = errors.New("the outbox has no shard")

// replayRows reads a page of end's shard, from last up to end. If last is in another shard, the page starts at the
// beginning.
func replayRows(ctx context.Context, db *pgxpool.Pool, end, last Place, f ReplayFilter, limit int) ([]row, error) {
	after := int64(0)
	if last.Shard == end.Shard {
		after = last.ID
	}
	optional := func(at time.Time) *time.Time {
		if at.IsZero() {
			return nil
		}
		return &at
	}
	found, err := db.Query(ctx, replaySQL, end.Shard, after, optional(f.Since), optional(f.Until),
		append([]string{}, f.Types...), append([]string{}, f.Keys...), append([]uuid.UUID{}, f.IDs...), limit, end.ID)
	if err != nil {
		return nil, fmt.Errorf("read outbox: %w", postgres.Classify(err))
	}
	rows, err := pgx.CollectRows(found, func(r pgx.CollectableRow) (scanned row, err error) {
		m := &scanned.message
		err = r.Scan(&scanned.id, &m.ID, &m.Type, &m.Key, &m.Payload, &scanned.headers, &m.CreatedAt)
		m.Headers = scanned.headers.Map
		return scanned, err
	})
	if err != nil {
		return nil, fmt.Errorf("read outbox: %w", postgres.Classify(err))
	}
	return rows, nil
}

// publishAgain publishes a page and waits for the verdicts. It returns how many messages it left out because no queue
// wanted them or because they are malformed.
func publishAgain(ctx context.Context, publisher messaging.Publisher, rows []row) (leftOut int, err error) {
	messages := make([]messaging.Message, 0, len(rows))
	for _, row := range rows {
		if err := row.validate(); err != nil {
			leftOut++
			slog.WarnContext(ctx, "malformed message not replayed", "message_id", row.message.ID, "error", err)
			continue
		}
		messages = append(messages, row.message)
	}
	receipt, err := publisher.Publish(ctx, messages)
	if err != nil {
		return 0, fmt.Errorf("%w: %w", errBroker, err)
	}
	for i, verdict := range receipt.Wait(ctx) {
		switch {
		case errors.Is(verdict, messaging.ErrReturned):
			leftOut++
			slog.WarnContext(ctx, "replayed message is unroutable",
				"message_id", messages[i].ID, "type", messages[i].Type)
		case verdict != nil:
			_ = publisher.Close() // it is broken or no longer needed
			return 0, fmt.Errorf("%w: replay message %s: %w", errBroker, messages[i].ID, verdict)
		}
	}
	return leftOut, nil
}
