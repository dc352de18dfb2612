// Package postgres opens the connection pool and runs transactions.
//
// It guarantees that an error of Transact is unambiguous. Either the transaction certainly wrote nothing, or the error
// wraps ErrOutcomeUnknown: the answer to COMMIT never arrived, or Postgres committed below the configured level of
// durability. A caller that gets ErrOutcomeUnknown repeats the request with the same IDs.
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

// Config describes how to connect to the database.
type Config struct {
	// URL is a libpq connection string or URL. If it leads to a pooler in transaction mode, it must set a
	// default_query_exec_mode that needs no session, such as cache_describe: see session.IsPooled.
	URL string
	// ApplicationName is shown in pg_stat_activity. Default: the application name in the URL.
	ApplicationName string
	// MaxConns bounds the pool. Default 10: fewer connections already saturate two cores.
	MaxConns int32
	// GenericPlans plans each prepared statement once instead of for each set of parameters, and forces index scans.
	// Planning over the partitions costs the relay more than reading a page. Without forced index scans, a plan made
	// while a table is known to be empty would scan the whole table until the next ANALYZE; 30,000 messages later that
	// took 38 ms per page.
	GenericPlans bool
	// ConnectTimeout bounds one attempt to connect. Default 5 s: a black hole must not look like a slow query.
	ConnectTimeout time.Duration
	// IdleInTransaction is how long a transaction may be idle before Postgres ends its session. Default 1 min.
	IdleInTransaction time.Duration
	// TracerProvider receives a span for each statement that runs within a trace. The span contains the statement's
	// text, in which this project's statements put no values, and never its arguments. Default: none.
	TracerProvider trace.TracerProvider
}

// Open returns a pool. It does not connect, so the database may be down at start-up.
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
			otelpgx.WithMeterProvider(noop.NewMeterProvider()), otelpgx.WithDisableConnectionDetailsInAttributes())
	}
	params := parsed.ConnConfig.RuntimeParams
	if config.ApplicationName != "" {
		params["application_name"] = config.ApplicationName
	}
	pooled := session.IsPooled(parsed.ConnConfig)
	if config.GenericPlans && !pooled {
		params["plan_cache_mode"], params["enable_seqscan"] = "force_generic_plan", "off"
		// An unavoidable sequential scan now has such a high estimated cost that Postgres would compile it, each time.
		params["jit"] = "off"
	}
	options := session.Options{Pooled: pooled, IdleInTransaction: config.IdleInTransaction}
	local, err := session.Pin(parsed.ConnConfig, options)
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

// reloadTLS returns a function that reads the certificate files named in the URL again for each connection. Operators
// replace certificates while the service runs, but pgx reads them only once. While the files are unusable, for example
// because only one of two has been replaced, the function uses the previous certificates.
func reloadTLS(url string, first *pgx.ConnConfig) func(context.Context, *pgx.ConnConfig) error {
	var usable atomic.Pointer[pgx.ConnConfig]
	usable.Store(first)
	return func(ctx context.Context, next *pgx.ConnConfig) error {
		if fresh, err := pgx.ParseConfig(url); err == nil {
			usable.Store(fresh)
		} else {
			slog.WarnContext(ctx, "certificates for postgres are unusable; the previous ones stay in use", "error", err)
		}
		from := usable.Load()
		next.TLSConfig, next.Fallbacks = from.TLSConfig, from.Fallbacks
		return nil
	}
}

// Prepares reports whether conn prepares each statement once and keeps its plan. Connections of Open do, unless they go
// through a pooler. On other connections Postgres plans a statement each time, which can cost more than running it.
func Prepares(conn *pgx.Conn) bool { return conn.PgConn().CustomData()[prepares] == true }

// The keys of a connection's custom data.
const (
	// settingSQL is the statement with which each transaction starts on a connection through a pooler.
	settingSQL = "setting"
	// prepares is the result of Prepares.
	prepares = "prepares"
	// syncWaitCancelled is true if a COMMIT stopped waiting for its standby.
	syncWaitCancelled = "sync_wait_cancelled"
)

// noteCancelledSyncWait records the warning that makes the outcome of a successful COMMIT unknown: the transaction is
// visible here but on no standby, and a failover would undo it. Postgres reports this only as a warning (SQLSTATE
// 01000).
func noteCancelledSyncWait(conn *pgconn.PgConn, notice *pgconn.Notice) {
	if notice.Code == "01000" && notice.Routine == "SyncRepWaitForLSN" {
		conn.CustomData()[syncWaitCancelled] = true
	}
}
