package postgres

import "github.com/jackc/pgx/v5"

// ConfirmReads makes the COMMIT of tx wait for the synchronous standby even if tx writes nothing, where Postgres would
// not. Then what tx has read is as safe from a failover as what it writes, and an answer that rests on it ("this was
// done before") cannot be taken back. It costs nothing if a value is Deferred, and a statement in the batch of COMMIT
// if not.
//
// A row can be visible and still be on no standby: its own transaction gave up waiting and said ErrOutcomeUnknown. The
// write-ahead log is sequential, so a record that is written now and confirmed proves that row as well. A transaction
// that has read such a row and cannot have it confirmed returns ErrOutcomeUnknown, too.
//
// It does nothing if tx was not begun by Transact.
func ConfirmReads(tx pgx.Tx) {
	if t, ok := tx.(*transaction); ok {
		t.pending.confirm = true
	}
}

// COMMIT waits for the standby only if its transaction has written to the log, for which an XID alone is not enough.
// The smallest record there is carries no data and is not decoded by anybody.
const confirmSQL = `
SELECT pg_logical_emit_message(true, '', '') WHERE current_setting('synchronous_standby_names') <> ''`
