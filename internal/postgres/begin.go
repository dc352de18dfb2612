package postgres

import (
	"context"
	"fmt"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// beginning is a transaction that sends BEGIN in one batch with its first statement or batch, which saves a round trip.
// If the first call cannot be part of a batch, BEGIN is sent alone. An unused transaction never begins.
type beginning struct {
	pgx.Tx // nil until it has begun
	conn   *pgx.Conn
	// ctx is for the two methods that take no context.
	ctx context.Context
	// failed is why it has not begun. As after any failed statement, nothing can be done in it any more.
	failed error
	// over means committed or rolled back. Another caller has the connection now, or soon will.
	over bool
}

// send begins the transaction and sends statements in the same batch. It returns the results of the statements without
// those of BEGIN. The caller must close them.
func (b *beginning) send(ctx context.Context, statements ...*pgx.QueuedQuery) pgx.BatchResults {
	var batch pgx.Batch
	batch.BeginTx(pgx.TxOptions{IsoLevel: pgx.ReadCommitted})
	if setting, _ := b.conn.PgConn().CustomData()[settingSQL].(string); setting != "" {
		batch.Queue(setting)
	}
	preamble := batch.Len()
	batch.QueuedQueries = append(batch.QueuedQueries, statements...)
	results := b.conn.SendBatch(ctx, &batch)
	b.Tx = results.Tx()
	for i := range preamble {
		if _, err := results.Exec(); err != nil && i == 0 { // all later results return the same error
			// BEGIN failed, or nothing was sent: Postgres could not prepare a statement, or pgx could not encode its
			// arguments.
			b.failed = fmt.Errorf("the transaction has not begun: %w", err)
		}
	}
	return results
}

// begun begins the transaction if it has not begun.
func (b *beginning) begun(ctx context.Context) (pgx.Tx, error) {
	if b.Tx == nil {
		if err := b.send(ctx).Close(); err != nil && b.failed == nil {
			return nil, fmt.Errorf("begin: %w", err)
		}
	}
	return b.Tx, b.failed
}

// ended closes a transaction that has not begun, or that was committed without pgx's Commit.
func (b *beginning) ended() {
	b.over = true
	var batch pgx.Batch
	batch.BeginTx(pgx.TxOptions{})
	b.Tx = pgx.FailedBatchResults(&batch, pgx.ErrTxClosed).Tx()
}

// isFirst reports whether to send a statement with BEGIN. A statement with options for pgx cannot be sent that way.
func (b *beginning) isFirst(sql string, args []any) bool {
	if b.Tx != nil || sql == "" {
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
func (b *beginning) Exec(ctx context.Context, sql string, args ...any) (pgconn.CommandTag, error) {
	// Without arguments sql may be several statements, which only Exec can send.
	if b.isFirst(sql, args) && len(args) > 0 {
		results := b.send(ctx, &pgx.QueuedQuery{SQL: sql, Arguments: args})
		tag, err := results.Exec()
		if closed := results.Close(); err == nil {
			err = closed
		}
		return tag, err
	}
	tx, err := b.begun(ctx)
	if err != nil {
		return pgconn.CommandTag{}, err
	}
	return tx.Exec(ctx, sql, args...)
}

// Query implements pgx.Tx.
func (b *beginning) Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error) {
	if b.isFirst(sql, args) {
		results := b.send(ctx, &pgx.QueuedQuery{SQL: sql, Arguments: args})
		rows, err := results.Query()
		if err != nil {
			_ = results.Close()
			return rows, err
		}
		return &firstRows{Rows: rows, results: results}, nil
	}
	tx, err := b.begun(ctx)
	if err != nil {
		rows, _ := pgx.FailedBatchResults(new(pgx.Batch), err).Query()
		return rows, err
	}
	return tx.Query(ctx, sql, args...)
}

// QueryRow implements pgx.Tx.
func (b *beginning) QueryRow(ctx context.Context, sql string, args ...any) pgx.Row {
	if b.isFirst(sql, args) {
		results := b.send(ctx, &pgx.QueuedQuery{SQL: sql, Arguments: args})
		return &firstRow{Row: results.QueryRow(), results: results}
	}
	tx, err := b.begun(ctx)
	if err != nil {
		return pgx.FailedBatchResults(new(pgx.Batch), err).QueryRow()
	}
	return tx.QueryRow(ctx, sql, args...)
}

// SendBatch implements pgx.Tx.
func (b *beginning) SendBatch(ctx context.Context, batch *pgx.Batch) pgx.BatchResults {
	if b.Tx == nil && batch.Len() > 0 {
		return firstResults{b.send(ctx, batch.QueuedQueries...)}
	}
	tx, err := b.begun(ctx)
	if err != nil {
		return pgx.FailedBatchResults(batch, err)
	}
	return tx.SendBatch(ctx, batch)
}

// CopyFrom implements pgx.Tx.
func (b *beginning) CopyFrom(
	ctx context.Context, table pgx.Identifier, columns []string, source pgx.CopyFromSource,
) (int64, error) {
	tx, err := b.begun(ctx)
	if err != nil {
		return 0, err
	}
	return tx.CopyFrom(ctx, table, columns, source)
}

// Prepare implements pgx.Tx.
func (b *beginning) Prepare(ctx context.Context, name, sql string) (*pgconn.StatementDescription, error) {
	tx, err := b.begun(ctx)
	if err != nil {
		return nil, err
	}
	return tx.Prepare(ctx, name, sql)
}

// Begin implements pgx.Tx: it makes a savepoint.
func (b *beginning) Begin(ctx context.Context) (pgx.Tx, error) {
	tx, err := b.begun(ctx)
	if err != nil {
		return nil, err
	}
	return tx.Begin(ctx)
}

// LargeObjects implements pgx.Tx.
func (b *beginning) LargeObjects() pgx.LargeObjects {
	tx, _ := b.begun(b.ctx) // if it fails, every call on the large objects fails too
	return tx.LargeObjects()
}

// Conn implements pgx.Tx. It begins the transaction, because statements sent directly on the connection are part of it.
func (b *beginning) Conn() *pgx.Conn {
	if _, err := b.begun(b.ctx); err != nil && !b.over && b.conn.PgConn().TxStatus() == 'I' {
		_ = b.conn.Close(b.ctx) // statements on it would commit on their own
	}
	return b.conn
}

// Commit implements pgx.Tx.
func (b *beginning) Commit(ctx context.Context) error {
	defer func() { b.over = true }()
	switch {
	case b.Tx == nil:
		b.ended()
		return nil
	case b.failed != nil:
		return fmt.Errorf("%w: %w", pgx.ErrTxCommitRollback, b.failed)
	}
	return b.Tx.Commit(ctx)
}

// Rollback implements pgx.Tx.
func (b *beginning) Rollback(ctx context.Context) error {
	defer func() { b.over = true }()
	if b.Tx == nil {
		b.ended()
		return nil
	}
	return b.Tx.Rollback(ctx)
}

// firstResults are the results of a batch that was sent with BEGIN.
type firstResults struct{ pgx.BatchResults }

// Tx implements pgx.BatchResults. The caller's batch begins no transaction.
func (r firstResults) Tx() pgx.Tx { return nil }

// firstRows are the rows of a statement that was sent with BEGIN. Closing them closes the batch.
type firstRows struct {
	pgx.Rows
	results pgx.BatchResults
	err     error // from closing the batch
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
	r.err = r.results.Close() // a second call does nothing
}

// Err implements pgx.Rows.
func (r *firstRows) Err() error {
	if err := r.Rows.Err(); err != nil {
		return err
	}
	return r.err
}

// firstRow is the row of a QueryRow that was sent with BEGIN.
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
