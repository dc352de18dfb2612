package ops

import (
	"context"
	"fmt"
	"time"

	"example.com/shop/internal/deadletter"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

// Entry is an operator's action in the audit log. Actions on dead letters have a log of their own.
type Entry struct {
	Action, Target string
	deadletter.Note
	Detail string
	At     time.Time
}

// Record stores an entry as part of tx, the transaction of the action.
func Record(ctx context.Context, tx pgx.Tx, e Entry) error {
	_, err := tx.Exec(ctx,
		`INSERT INTO operator_audit (action, target, reason, actor, detail) VALUES ($1, $2, $3, $4, $5)`,
		e.Action, e.Target, e.Reason, e.Actor, e.Detail)
	if err != nil {
		return fmt.Errorf("record action: %w", err)
	}
	return nil
}

// Log returns the last entries, newest first.
func Log(ctx context.Context, db *pgxpool.Pool, limit int) ([]Entry, error) {
	rows, err := db.Query(ctx,
		`SELECT action, target, actor, reason, detail, at FROM operator_audit ORDER BY id DESC LIMIT $1`, limit)
	if err != nil {
		return nil, fmt.Errorf("read audit log: %w", err)
	}
	return pgx.CollectRows(rows, func(row pgx.CollectableRow) (e Entry, err error) {
		err = row.Scan(&e.Action, &e.Target, &e.Actor, &e.Reason, &e.Detail, &e.At)
		return e, err
	})
}
