// Package session opens connections to the database and sets up their sessions: it pins every setting that the core relies on and that a server, a
// database or a role may set otherwise.
//
// It guarantees that a session made through it has the settings listed here, whatever ALTER SYSTEM, ALTER DATABASE or
// ALTER ROLE say. A pooler in transaction mode has no sessions: there, each transaction sets them for itself, and BEGIN
// says the isolation level.
//
// What is left alone is what operators decide: synchronous_commit, memory, planner costs.
package session

import (
	"fmt"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
)

// Setting is a setting of Postgres.
type Setting struct {
	Name, Value string
	// Fixed: no other value works. Of the others, a connection URL may give its own.
	Fixed bool
}

const (
	// LockTimeout bounds every wait for a lock. It is shorter than COMMIT may take, so that a lock that nobody releases,
	// as of an orphaned prepared transaction, ends in an error that says that nothing was written.
	LockTimeout       = 5 * time.Second
	idleInTransaction = "idle_in_transaction_session_timeout"
)

// Pinned are the settings of every session.
var Pinned = []Setting{
	// Under another level a transaction that has waited for a lock would not see what its holder committed.
	{"default_transaction_isolation", "read committed", true},
	// Under LATIN1 one row with a foreign character could not be read, and would stop the relay.
	{"client_encoding", "UTF8", true},
	// All names in statements mean the schema that migrations write to.
	{"search_path", "public", true},
	// Postgres tells in a warning only that COMMIT gave up waiting for its standby.
	{"client_min_messages", "warning", true},
	{"lock_timeout", milliseconds(LockTimeout), false},
	// A process that was frozen in a transaction would hold its locks, and with them everyone else, for as long as it is.
	{idleInTransaction, milliseconds(time.Minute), false},
	// Statements end with the context of whoever runs them. A limit for all of them would end a repair halfway.
	{"statement_timeout", "0", false},
	// Plans for any parameters read whole tables where those for the ones given would use an index.
	{"plan_cache_mode", "auto", false},
}

func milliseconds(d time.Duration) string { return fmt.Sprint(d.Milliseconds()) }

// Options are what differs between sessions.
type Options struct {
	// Pooled: the connection goes to a pooler in transaction mode.
	Pooled bool
	// IdleInTransaction is how long a transaction may stand still. Default 1 min.
	IdleInTransaction time.Duration
}

// Pin puts the settings into config, except for those that its URL gives. It returns an error that names a fixed
// setting to which the URL gives another value. A pooler would refuse most settings; for a connection through one, Pin
// returns the statement that sets them for one transaction, else "".
func Pin(config *pgx.ConnConfig, options Options) (local string, err error) {
	var calls []string
	for _, one := range Pinned {
		if one.Name == idleInTransaction && options.IdleInTransaction > 0 {
			one.Value = milliseconds(options.IdleInTransaction)
		}
		given, ok := config.RuntimeParams[one.Name]
		if ok && one.Fixed && !strings.EqualFold(given, one.Value) {
			return "", fmt.Errorf("the connection URL sets %s to %q, and only %q works", one.Name, given, one.Value)
		}
		switch {
		case ok:
		case !options.Pooled || one.Name == "client_encoding": // which poolers keep for each client
			config.RuntimeParams[one.Name] = one.Value
		case one.Name != "default_transaction_isolation": // which BEGIN says
			calls = append(calls, fmt.Sprintf("set_config('%s', '%s', true)", one.Name, one.Value))
		}
	}
	if len(calls) > 0 {
		local = "SELECT " + strings.Join(calls, ", ")
	}
	return local, nil
}
