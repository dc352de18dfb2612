package postgres

import "github.com/jackc/pgx/v5"

// ConfirmReads makes the COMMIT of tx wait for the synchronous standby even if tx writes nothing; Postgres alone would
// not wait. Then the rows that tx has read are as safe from a failover as those that it writes, and no failover can
// undo an answer that rests on them ("this was done before"). It costs nothing if tx has Deferred values, and
// otherwise one statement in the batch of COMMIT.
//
// A row can be visible without being on any standby, if its own transaction stopped waiting and returned
// ErrOutcomeUnknown. The write-ahead log is sequential, so a later record that the standby confirms proves that it has
// the row too. A transaction that has read such a row and gets no confirmation also returns ErrOutcomeUnknown.
//
// ConfirmReads does nothing if Transact did not begin tx.
func ConfirmReads(tx pgx.Tx) {
	if t, ok := tx.(*transaction); ok {
		t.pending.confirm = true
	}
}

// confirmSQL writes the smallest possible WAL record, which carries no data and which no subscriber decodes. COMMIT
// waits for the standby only if its transaction has written to the WAL; an XID alone is not enough.
const confirmSQL = `
SELECT pg_logical_emit_message(true, '', '') WHERE current_setting('synchronous_standby_names') <> ''`
