package postgres

import "github.com/jackc/pgx/v5"

// AfterCommit makes Transact call fn after tx has committed, or may have committed because the outcome is unknown.
// Transact does not call fn after a rollback of tx or of a savepoint that contains the call to AfterCommit, or if the
// process dies at the commit. So use it for hints, such as a doorbell, and never for work that must happen. fn must not
// block: the caller of Transact waits for it.
//
// AfterCommit panics if Transact did not begin tx, or if tx has ended: fn would never be called.
func AfterCommit(tx pgx.Tx, fn func()) {
	t, ok := tx.(*transaction)
	if !ok || !t.open() {
		panic("postgres: AfterCommit needs an open transaction of Transact")
	}
	t.pending.after = append(t.pending.after, fn)
}
