package ops

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

const behindSQL = `
SELECT format('%s continues from %s, but %s is in use', col, drawn, used), col IN ('outbox.id', 'inbox_retry.seq')
FROM sequences_behind()
UNION ALL
SELECT format('new messages go to shard %s, which no relay reads', shard), true FROM outbox_stray_shards() AS shard`

// leftBehind is something that was not moved together with the rows of a database.
type leftBehind struct {
	Text string
	// Ordering means that the order of messages depends on it.
	Ordering bool
}

func findBehind(ctx context.Context, db *pgxpool.Pool) ([]leftBehind, error) {
	rows, err := db.Query(ctx, behindSQL)
	if err == nil {
		var found []leftBehind
		if found, err = pgx.CollectRows(rows, pgx.RowToStructByPos[leftBehind]); err == nil {
			return found, nil
		}
	}
	return nil, fmt.Errorf("check sequences: %w", err)
}

// checkSequences finds columns whose sequence is behind the numbers in use, as after logical replication, and shards
// that new messages go to and no relay reads.
func checkSequences(ctx context.Context, target Target) (Finding, error) {
	all, err := findBehind(ctx, target.DB)
	var texts []string
	for _, behind := range all {
		texts = append(texts, behind.Text)
	}
	return listFinding(texts, err, Wrong, "each is ahead of the numbers in use")
}

// ErrBehind means that rows were moved into this database without the sequences that number them. New rows then get
// lower numbers than older ones, so a message overtakes others of its key.
var ErrBehind = errors.New("sequences did not move with the rows, and the order of messages would be lost; " +
	"run the command `outbox repair` once")

// CheckSequences returns ErrBehind, with the names, if a sequence is behind on which the order of messages depends. A
// process checks when it starts.
//
// Meanwhile, inserts continue. The log is read by snapshots, so the relay skips nothing because of its id, and the
// repair gives new ids to what was inserted. A running relay also continues. In the same cluster, for instance after
// rows were restored by hand, it only risks that of two undelivered messages of a key the younger comes first. A relay
// or consumer that starts does not take that risk. It is larger for a consumer, because the rows
// of inbox_retry have no other order.
func CheckSequences(ctx context.Context, db *pgxpool.Pool) error {
	all, err := findBehind(ctx, db)
	if err != nil {
		return err
	}
	var texts []string
	for _, behind := range all {
		if behind.Ordering {
			texts = append(texts, behind.Text)
		}
	}
	if len(texts) > 0 {
		return fmt.Errorf("%w: %s", ErrBehind, strings.Join(texts, "; "))
	}
	return nil
}
