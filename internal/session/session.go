// Package session opens connections to the database and pins the session settings that the core relies on.
//
// It is a package of its own because migrations, ops and testenv use it besides postgres.
//
// It guarantees that a session has the settings listed here, even if ALTER SYSTEM, ALTER DATABASE or ALTER ROLE set
// others. A pooler in transaction mode has no sessions: there, each transaction sets them for itself, and BEGIN sets
// the isolation level.
//
// Settings that operators decide on stay as they are: synchronous_commit, memory, planner costs.
package session

import (
	"fmt"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
)

// Setting is a Postgres setting.
type Setting struct {
	Name, Value string
	// Fixed means that no other value works. A connection URL may override settings that are not fixed.
	Fixed bool
}

const (
	// LockTimeout bounds every wait for a lock. It is shorter than the time that COMMIT may take. So a wait for a lock
	// that nobody releases, such as that of an orphaned prepared transaction, ends with an error that says that nothing
	// was written.
	LockTimeout       = 5 * time.Second
	idleInTransaction = "idle_in_transaction_session_timeout"
)

// Pinned are the settings of every session.
var Pinned = []Setting{
	// Under another level, a transaction that has waited for a lock would not see what the lock's holder committed.
	{"default_transaction_isolation", "read committed", true},
	// Under LATIN1, one row with a character outside of it could not be read and would stop the relay.
	{"client_encoding", "UTF8", true},
	// Names in statements must resolve to the schema that migrations write to.
	{"search_path", "public", true},
	// Postgres reports only in a warning that COMMIT gave up waiting for its standby.
	{"client_min_messages", "warning", true},
	{"lock_timeout", milliseconds(LockTimeout), false},
	// A process that is frozen in a transaction would keep its locks, and block everyone else, until it resumes.
	{idleInTransaction, milliseconds(time.Minute), false},
	// The caller's context bounds each statement. A limit for all statements would stop a repair halfway.
	{"statement_timeout", "0", false},
	// Generic plans read whole tables where plans for the given parameters would use an index.
	{"plan_cache_mode", "auto", false},
}

func milliseconds(d time.Duration) string { return fmt.Sprint(d.Milliseconds()) }

// Options are the options of one session.
type Options struct {
	// Pooled means that the connection goes through a pooler in transaction mode.
	Pooled bool
	// IdleInTransaction is how long a transaction may be idle. Default 1 min.
	IdleInTransaction time.Duration
}

// Pin adds the settings to config, except for those that its URL sets. It returns an error if the URL sets a fixed
// setting to another value. A pooler would refuse most settings. For a connection through a pooler, Pin returns a
// statement that sets them for one transaction, otherwise "".
func Pin(config *pgx.ConnConfig, options Options) (local string, err error) {
	var calls []string
	for _, setting := range Pinned {
		if setting.Name == idleInTransaction && options.IdleInTransaction > 0 {
			setting.Value = milliseconds(options.IdleInTransaction)
		}
		given, ok := config.RuntimeParams[setting.Name]
		if ok && setting.Fixed && !strings.EqualFold(given, setting.Value) {
			return "", fmt.Errorf("the connection URL sets %s to %q, but only %q works",
				setting.Name, given, setting.Value)
		}
		switch {
		case ok:
		case !options.Pooled || setting.Name == "client_encoding": // poolers keep client_encoding for each client
			config.RuntimeParams[setting.Name] = setting.Value
		case setting.Name != "default_transaction_isolation": // BEGIN sets the isolation level
			calls = append(calls, fmt.Sprintf("set_config('%s', '%s', true)", setting.Name, setting.Value))
		}
	}
	if len(calls) > 0 {
		local = "SELECT " + strings.Join(calls, ", ")
	}
	return local, nil
}
