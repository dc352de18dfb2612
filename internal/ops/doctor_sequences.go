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
SELECT format('%s goes on from %s, and %s is in use', col, drawn, used), col IN ('outbox.id', 'inbox_retry.seq')
    FROM sequences_behind()
UNION ALL
SELECT format('new messages are put into shard %s, which nobody reads', shard), true FROM outbox_stray_shards() AS shard`

// leftBehind is something that did not travel with the rows of a database that was moved.
type leftBehind struct {
	Text string
	// Ordering: the order of messages depends on it.
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
	return nil, fmt.Errorf("look at sequences: %w", err)
}

// checkSequences finds the columns whose sequence is behind the numbers in use, as after logical replication, and
// shards that nobody reads.
func checkSequences(ctx context.Context, p Target) (Finding, error) {
	all, err := findBehind(ctx, p.DB)
	var texts []string
	for _, one := range all {
		texts = append(texts, one.Text)
	}
	return none(texts, err, Wrong, "each is ahead of the numbers in use")
}

// ErrBehind means that rows were moved into this database without the sequences that number them. What is numbered then
// comes before what is older: a message overtakes those of its key.
var ErrBehind = errors.New("sequences did not move with the rows, and the order of messages would be lost; run the " +
	"command `outbox repair` once")

// CheckSequences returns ErrBehind, with the names, if a sequence is behind on which the order of messages depends. A
// process looks when it starts.
//
// While it is so, inserts go on: the log is read by snapshots, so that nothing in it is skipped for its id, and the
// repair gives new ids to what was inserted. Nor does a relay stop that runs already: in the same cluster, rows
// restored by hand included, all it risks is that of two undelivered messages of a key the younger comes first. A relay
// and a consumer that start do not take that risk; for a consumer it is the larger one, since inbox_retry is ordered by
// nothing else.
func CheckSequences(ctx context.Context, db *pgxpool.Pool) error {
	all, err := findBehind(ctx, db)
	if err != nil {
		return err
	}
	var texts []string
	for _, one := range all {
		if one.Ordering {
			texts = append(texts, one.Text)
		}
	}
	if len(texts) > 0 {
		return fmt.Errorf("%w: %s", ErrBehind, strings.Join(texts, "; "))
	}
	return nil
}
