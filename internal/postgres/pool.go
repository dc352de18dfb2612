// Package postgres opens the connection pool and runs transactions.
//
// It guarantees that an error of Transact is honest. Either the transaction certainly left nothing behind, or the error
// wraps ErrOutcomeUnknown: COMMIT was sent and its answer never came, or Postgres took the commit back from the level
// of durability that it is configured for. A caller who gets ErrOutcomeUnknown repeats the request with the same IDs.
package postgres

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"sync/atomic"
	"time"

	"example.com/shop/internal/session"
	"github.com/exaring/otelpgx"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
	"go.opentelemetry.io/otel/metric/noop"
	"go.opentelemetry.io/otel/trace"
)

// Config says how to reach the database.
type Config struct {
	// URL is a libpq connection string or URL. One that goes to a pooler in transaction mode must say so by a
	// default_query_exec_mode that needs no session, such as cache_describe: see IsPooled.
	URL string
	// ApplicationName is shown in pg_stat_activity. Default: what the URL says.
	ApplicationName string
	// MaxConns bounds the pool. Default 10: two busy cores are saturated by fewer.
	MaxConns int32
	// GenericPlans plans each prepared statement once, for index scans, instead of trying anew for its parameters.
	// Planning over the partitions costs the relay more than reading a page. But a plan that is made while a table is
	// known to be empty would read all of it for as long as it is kept, which is until the next ANALYZE, and 30,000
	// messages later that took 38 ms a page.
	GenericPlans bool
	// ConnectTimeout bounds one attempt to connect. Default 5 s: a black hole must not look like a slow query.
	ConnectTimeout time.Duration
	// IdleInTransaction is how long Postgres lets a transaction stand still before it ends it. Default 1 min.
	IdleInTransaction time.Duration
	// TracerProvider takes a span of each statement that runs within a trace: its text, which our statements keep their
	// values out of, and never its arguments. Default: none.
	TracerProvider trace.TracerProvider
}

// Open makes a pool. It does not connect: a database that is away at start-up is a state like any other.
func Open(ctx context.Context, config Config) (*pgxpool.Pool, error) {
	parsed, err := pgxpool.ParseConfig(config.URL)
	if err != nil {
		return nil, fmt.Errorf("parse postgres url: %w", err)
	}
	parsed.MaxConns = cmp.Or(config.MaxConns, 10)
	parsed.ConnConfig.ConnectTimeout = cmp.Or(config.ConnectTimeout, session.ConnectTimeout)
	parsed.ConnConfig.DialFunc = session.Dial
	parsed.ConnConfig.OnNotice = noteCancelledSyncWait
	if config.TracerProvider != nil {
		parsed.ConnConfig.Tracer = otelpgx.NewTracer(otelpgx.WithTracerProvider(config.TracerProvider),
			otelpgx.WithMeterProvider(noop.NewMeterProvider()),
			otelpgx.WithDisableConnectionDetailsInAttributes())
	}
	params := parsed.ConnConfig.RuntimeParams
	if config.ApplicationName != "" {
		params["application_name"] = config.ApplicationName
	}
	pooled := session.IsPooled(parsed.ConnConfig)
	if config.GenericPlans && !pooled {
		params["plan_cache_mode"], params["enable_seqscan"] = "force_generic_plan", "off"
		// What must be scanned all the same looks so dear that Postgres would compile it, each time.
		params["jit"] = "off"
	}
	local, err := session.Pin(parsed.ConnConfig, session.Options{Pooled: pooled,
		IdleInTransaction: config.IdleInTransaction})
	if err != nil {
		return nil, err
	}
	parsed.AfterConnect = func(_ context.Context, conn *pgx.Conn) error {
		notes := conn.PgConn().CustomData()
		notes[prepares], notes[settingSQL] = !pooled, local
		return nil
	}
	if parsed.ConnConfig.TLSConfig != nil {
		parsed.BeforeConnect = reloadTLS(config.URL, parsed.ConnConfig)
	}
	pool, err := pgxpool.NewWithConfig(ctx, parsed)
	if err != nil {
		return nil, fmt.Errorf("open postgres pool: %w", err)
	}
	return pool, nil
}

// reloadTLS returns a function that reads the files that the URL names anew for each connection: certificates are
// replaced while the service runs, and pgx reads them once. While the files cannot be used, because only one of two has
// been replaced, those from before are.
func reloadTLS(url string, first *pgx.ConnConfig) func(context.Context, *pgx.ConnConfig) error {
	var usable atomic.Pointer[pgx.ConnConfig]
	usable.Store(first)
	return func(ctx context.Context, next *pgx.ConnConfig) error {
		if fresh, err := pgx.ParseConfig(url); err == nil {
			usable.Store(fresh)
		} else {
			slog.WarnContext(ctx, "certificates for postgres cannot be used; what they held before stays in force",
				"error", err)
		}
		from := usable.Load()
		next.TLSConfig, next.Fallbacks = from.TLSConfig, from.Fallbacks
		return nil
	}
}

// Prepares tells whether conn prepares each statement once and keeps its plan, as those of Open do that go to no
// pooler. Elsewhere a statement is planned each time, which can cost more than to run it.
func Prepares(conn *pgx.Conn) bool { return conn.PgConn().CustomData()[prepares] == true }

// settingSQL is the key under which a connection through a pooler knows what its transactions set first.
const settingSQL = "setting"

// prepares is the key under which a connection knows the answer to Prepares.
const prepares = "prepares"

// syncWaitCancelled is the key under which a connection remembers that a COMMIT gave up waiting for its standby.
const syncWaitCancelled = "sync_wait_cancelled"

// noteCancelledSyncWait remembers the warning that turns a successful COMMIT into an unknown one: the transaction is
// visible here, is on no standby, and a failover would take it back. Postgres says so in a warning (SQLSTATE 01000)
// only.
func noteCancelledSyncWait(conn *pgconn.PgConn, notice *pgconn.Notice) {
	if notice.Code == "01000" && notice.Routine == "SyncRepWaitForLSN" {
		conn.CustomData()[syncWaitCancelled] = true
	}
}
