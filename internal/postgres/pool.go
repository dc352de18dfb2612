// Package postgres opens the connection pool and runs transactions.
//
// It guarantees that an error of Transact is honest. Either the transaction certainly left nothing behind, or the error
// wraps ErrOutcomeUnknown: COMMIT was sent and its answer never came, or Postgres took the commit back from the level of
// durability that it is configured for. A caller who gets ErrOutcomeUnknown repeats the request with the same IDs.
package postgres

import (
	"cmp"
	"context"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
)

// Config says how to reach the database.
type Config struct {
	// URL is a libpq connection string or URL.
	URL string
	// ApplicationName is shown in pg_stat_activity. Default: what the URL says.
	ApplicationName string
	// MaxConns bounds the pool. Default 10: two busy cores are saturated by fewer.
	MaxConns int32
	// GenericPlans plans each prepared statement once instead of trying anew for its parameters. Planning over the partitions costs the relay
	// more than reading a page, and its statements are made to need no luck with the planner.
	GenericPlans bool
	// ConnectTimeout bounds one attempt to connect. Default 5 s: a black hole must not look like a slow query.
	ConnectTimeout time.Duration
}

// Open makes a pool. It does not connect: a database that is away at start-up is a state like any other.
func Open(ctx context.Context, config Config) (*pgxpool.Pool, error) {
	parsed, err := pgxpool.ParseConfig(config.URL)
	if err != nil {
		return nil, fmt.Errorf("parse postgres url: %w", err)
	}
	parsed.MaxConns = cmp.Or(config.MaxConns, 10)
	parsed.ConnConfig.ConnectTimeout = cmp.Or(config.ConnectTimeout, 5*time.Second)
	if config.ApplicationName != "" {
		parsed.ConnConfig.RuntimeParams["application_name"] = config.ApplicationName
	}
	if _, given := parsed.ConnConfig.RuntimeParams[idleTimeoutParam]; !given {
		parsed.ConnConfig.RuntimeParams[idleTimeoutParam] = "60s"
	}
	if config.GenericPlans {
		parsed.ConnConfig.RuntimeParams["plan_cache_mode"] = "force_generic_plan"
	}
	parsed.ConnConfig.OnNotice = noteCancelledSyncWait
	pool, err := pgxpool.NewWithConfig(ctx, parsed)
	if err != nil {
		return nil, fmt.Errorf("open postgres pool: %w", err)
	}
	return pool, nil
}

// idleTimeoutParam lets Postgres end the transaction of a process that was frozen in the middle of it: its locks on keys and inbox rows
// would hold up everyone else for as long as it is.
const idleTimeoutParam = "idle_in_transaction_session_timeout"

// syncWaitCancelled is the key under which a connection remembers that a COMMIT gave up waiting for its standby.
const syncWaitCancelled = "sync_wait_cancelled"

// noteCancelledSyncWait remembers the warning that turns a successful COMMIT into an unknown one: the transaction is
// visible here, is on no standby, and a failover would take it back. Postgres says so in a warning (SQLSTATE 01000) only.
func noteCancelledSyncWait(conn *pgconn.PgConn, notice *pgconn.Notice) {
	if notice.Code == "01000" && notice.Routine == "SyncRepWaitForLSN" {
		conn.CustomData()[syncWaitCancelled] = true
	}
}
