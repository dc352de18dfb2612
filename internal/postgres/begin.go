package postgres

import (
	"context"
	"fmt"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// beginning is a transaction whose BEGIN goes to Postgres in one batch with its first statement or batch, so that it
// costs no round trip of its own. Before what cannot be part of a batch it begins by itself, and it never begins if
// nothing is asked of it.
type beginning struct {
	pgx.Tx // nil until it has begun
	conn   *pgx.Conn
	// ctx is for the two methods that have none of their own.
	ctx context.Context
	// failed is why it has not begun. As after any statement that fails, nothing can be done in it any more.
	failed error
	// over: committed or rolled back. Somebody else has the connection now, or soon.
	over bool
}

// send begins the transaction and sends statements along. The results that it returns are those of the statements
// alone, and must be closed.
func (t *beginning) send(ctx context.Context, statements ...*pgx.QueuedQuery) pgx.BatchResults {
	var batch pgx.Batch
	batch.BeginTx(pgx.TxOptions{IsoLevel: pgx.ReadCommitted})
	if setting, _ := t.conn.PgConn().CustomData()[settingSQL].(string); setting != "" {
		batch.Queue(setting)
	}
	ours := batch.Len()
	batch.QueuedQueries = append(batch.QueuedQueries, statements...)
	results := t.conn.SendBatch(ctx, &batch)
	t.Tx = results.Tx()
	for i := range ours {
		if _, err := results.Exec(); err != nil && i == 0 { // an error is that of everything that follows
			// BEGIN failed; or nothing was sent, since Postgres could not prepare the statement, or pgx not encode its
			// arguments.
			t.failed = fmt.Errorf("the transaction has not begun: %w", err)
		}
	}
	return results
}

// begun begins the transaction, unless it has begun.
func (t *beginning) begun(ctx context.Context) (pgx.Tx, error) {
	if t.Tx == nil {
		if err := t.send(ctx).Close(); err != nil && t.failed == nil {
			return nil, fmt.Errorf("begin: %w", err)
		}
	}
	return t.Tx, t.failed
}

// ended closes a transaction that has not begun, or whose COMMIT went past pgx' own.
func (t *beginning) ended() {
	t.over = true
	var batch pgx.Batch
	batch.BeginTx(pgx.TxOptions{})
	t.Tx = pgx.FailedBatchResults(&batch, pgx.ErrTxClosed).Tx()
}

// isFirst tells whether a statement is to be sent with BEGIN. One with options for pgx cannot be.
func (t *beginning) isFirst(sql string, args []any) bool {
	if t.Tx != nil || sql == "" {
		return false
	}
	if len(args) == 0 {
		return true
	}
	switch args[0].(type) {
	case pgx.QueryExecMode, pgx.QueryResultFormats, pgx.QueryResultFormatsByOID:
		return false
	}
	return true
}

// Exec implements pgx.Tx.
func (t *beginning) Exec(ctx context.Context, sql string, args ...any) (pgconn.CommandTag, error) {
	// Without arguments it may be several statements, which only Exec can send.
	if t.isFirst(sql, args) && len(args) > 0 {
		results := t.send(ctx, &pgx.QueuedQuery{SQL: sql, Arguments: args})
		tag, err := results.Exec()
		if closed := results.Close(); err == nil {
			err = closed
		}
		return tag, err
	}
	tx, err := t.begun(ctx)
	if err != nil {
		return pgconn.CommandTag{}, err
	}
	return tx.Exec(ctx, sql, args...)
}

// Query implements pgx.Tx.
func (t *beginning) Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error) {
	if t.isFirst(sql, args) {
		results := t.send(ctx, &pgx.QueuedQuery{SQL: sql, Arguments: args})
		rows, err := results.Query()
		if err != nil {
			_ = results.Close()
			return rows, err
		}
		return &firstRows{Rows: rows, results: results}, nil
	}
	tx, err := t.begun(ctx)
	if err != nil {
		rows, _ := pgx.FailedBatchResults(new(pgx.Batch), err).Query()
		return rows, err
	}
	return tx.Query(ctx, sql, args...)
}

// QueryRow implements pgx.Tx.
func (t *beginning) QueryRow(ctx context.Context, sql string, args ...any) pgx.Row {
	if t.isFirst(sql, args) {
		results := t.send(ctx, &pgx.QueuedQuery{SQL: sql, Arguments: args})
		return &firstRow{Row: results.QueryRow(), results: results}
	}
	tx, err := t.begun(ctx)
	if err != nil {
		return pgx.FailedBatchResults(new(pgx.Batch), err).QueryRow()
	}
	return tx.QueryRow(ctx, sql, args...)
}

// SendBatch implements pgx.Tx.
func (t *beginning) SendBatch(ctx context.Context, batch *pgx.Batch) pgx.BatchResults {
	if t.Tx == nil && batch.Len() > 0 {
		return firstResults{t.send(ctx, batch.QueuedQueries...)}
	}
	tx, err := t.begun(ctx)
	if err != nil {
		return pgx.FailedBatchResults(batch, err)
	}
	return tx.SendBatch(ctx, batch)
}

// CopyFrom implements pgx.Tx.
func (t *beginning) CopyFrom(
	ctx context.Context, table pgx.Identifier, columns []string, source pgx.CopyFromSource,
) (int64, error) {
	tx, err := t.begun(ctx)
	if err != nil {
		return 0, err
	}
	return tx.CopyFrom(ctx, table, columns, source)
}

// Prepare implements pgx.Tx.
func (t *beginning) Prepare(ctx context.Context, name, sql string) (*pgconn.StatementDescription, error) {
	tx, err := t.begun(ctx)
	if err != nil {
		return nil, err
	}
	return tx.Prepare(ctx, name, sql)
}

// Begin implements pgx.Tx: it makes a savepoint.
func (t *beginning) Begin(ctx context.Context) (pgx.Tx, error) {
	tx, err := t.begun(ctx)
	if err != nil {
		return nil, err
	}
	return tx.Begin(ctx)
}

// LargeObjects implements pgx.Tx.
func (t *beginning) LargeObjects() pgx.LargeObjects {
	tx, _ := t.begun(t.ctx) // if it fails, so does all that is done with them
	return tx.LargeObjects()
}

// Conn implements pgx.Tx. What is done past the transaction is part of it all the same, so it begins.
func (t *beginning) Conn() *pgx.Conn {
	if _, err := t.begun(t.ctx); err != nil && !t.over && t.conn.PgConn().TxStatus() == 'I' {
		_ = t.conn.Close(t.ctx) // what is done with it now would stay
	}
	return t.conn
}

// Commit implements pgx.Tx.
func (t *beginning) Commit(ctx context.Context) error {
	defer func() { t.over = true }()
	switch {
	case t.Tx == nil:
		t.ended()
		return nil
	case t.failed != nil:
		return fmt.Errorf("%w: %w", pgx.ErrTxCommitRollback, t.failed)
	}
	return t.Tx.Commit(ctx)
}

// Rollback implements pgx.Tx.
func (t *beginning) Rollback(ctx context.Context) error {
	defer func() { t.over = true }()
	if t.Tx == nil {
		t.ended()
		return nil
	}
	return t.Tx.Rollback(ctx)
}

// firstResults are those of a batch that was sent with BEGIN.
type firstResults struct{ pgx.BatchResults }

// Tx implements pgx.BatchResults: the caller's batch begins none.
func (r firstResults) Tx() pgx.Tx { return nil }

// firstRows are the answer to a statement that was sent with BEGIN. The batch ends with them.
type firstRows struct {
	pgx.Rows
	results pgx.BatchResults
	err     error // of the batch
}

// Next implements pgx.Rows.
func (r *firstRows) Next() bool {
	if r.Rows.Next() {
		return true
	}
	r.Close()
	return false
}

// Close implements pgx.Rows.
func (r *firstRows) Close() {
	r.Rows.Close()
	r.err = r.results.Close() // more often than once it does nothing
}

// Err implements pgx.Rows.
func (r *firstRows) Err() error {
	if err := r.Rows.Err(); err != nil {
		return err
	}
	return r.err
}

// firstRow is the only one.
type firstRow struct {
	pgx.Row
	results pgx.BatchResults
}

// Scan implements pgx.Row.
func (r *firstRow) Scan(dest ...any) error {
	err := r.Row.Scan(dest...)
	if closed := r.results.Close(); err == nil {
		err = closed
	}
	return err
}
