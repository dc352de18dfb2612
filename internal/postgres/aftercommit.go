package postgres

import "github.com/jackc/pgx/v5"

// AfterCommit has fn called once tx is committed, or may be: when nobody knows the outcome. It is not called after a
// rollback, of tx or of a savepoint around it, and not if the process dies at the commit. So it is for hints, a
// doorbell, and never for what must happen. fn must not block: the caller of Transact waits for it.
//
// It panics if tx was not begun by Transact, or has ended: fn would never be called.
func AfterCommit(tx pgx.Tx, fn func()) {
	t, ok := tx.(*transaction)
	if !ok || !t.open() {
		panic("postgres: AfterCommit wants an open transaction of Transact")
	}
	t.pending.after = append(t.pending.after, fn)
}
