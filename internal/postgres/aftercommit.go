package postgres

import (
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// afterCommit is the key under which a connection keeps what to call when its transaction is committed.
const afterCommit = "after_commit"

// AfterCommit has fn called once tx is committed, or may be: when nobody knows the outcome. It is not called after a rollback, and not if the
// process dies at the commit. So it is for hints, a doorbell, and never for what must happen. fn must not block: the caller of Transact waits for it.
//
// It panics if tx was not begun by Transact: fn would never be called.
func AfterCommit(tx pgx.Tx, fn func()) {
	calls, ok := tx.Conn().PgConn().CustomData()[afterCommit].(*[]func())
	if !ok {
		panic("postgres: AfterCommit wants a transaction of Transact")
	}
	*calls = append(*calls, fn)
}

// collectAfterCommit prepares a connection for the calls of AfterCommit in one transaction. What it returns makes them, if the transaction
// is or may be committed, and forgets them.
func collectAfterCommit(conn *pgconn.PgConn) (settle func(committed bool)) {
	calls := new([]func())
	conn.CustomData()[afterCommit] = calls
	return func(committed bool) {
		delete(conn.CustomData(), afterCommit)
		if !committed {
			return
		}
		for _, fn := range *calls {
			fn()
		}
	}
}
