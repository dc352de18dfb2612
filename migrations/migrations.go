// Package migrations contains the database schema as goose migrations, embedded into the binary.
//
// Any number of processes may call Up at once: with a session-level advisory lock, one of them works while the others
// wait. Migrations need a direct connection, because a transaction-mode pooler has no sessions.
package migrations

import (
	"context"
	"database/sql"
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"sync"

	"example.com/shop/internal/session"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/jackc/pgx/v5/stdlib"
	"github.com/pressly/goose/v3"
	"github.com/pressly/goose/v3/lock"
)

// FS contains the migrations, named NNNN_name.sql.
//
//go:embed *.sql
var FS embed.FS

// Up migrates the database at url to the newest version and returns the names of the migrations that it applied.
func Up(ctx context.Context, url string) (applied []string, err error) {
	config, err := pgx.ParseConfig(url)
	if err != nil {
		return nil, fmt.Errorf("parse postgres url: %w", err)
	}
	if err := check(ctx, config); err != nil {
		return nil, err
	}
	if _, err := session.Pin(config, session.Options{}); err != nil {
		return nil, err
	}
	db := stdlib.OpenDB(*config)
	defer db.Close()
	provider, err := newProvider(db)
	if err != nil {
		return nil, err
	}
	results, err := provider.Up(ctx)
	if err != nil {
		return nil, fmt.Errorf("migrate: %w", err)
	}
	for _, result := range results {
		applied = append(applied, result.Source.Path)
	}
	return applied, nil
}

// check refuses a database in which the service cannot work. It inspects a session with the server's default settings,
// as psql or a connection behind a pooler gets it, and not one that this service has set up.
func check(ctx context.Context, config *pgx.ConnConfig) error {
	conn, err := pgx.ConnectConfig(ctx, config)
	if err != nil {
		return err
	}
	defer conn.Close(context.WithoutCancel(ctx)) // bounded by pgx itself
	var encoding, path, schema string
	err = conn.QueryRow(ctx, `
		SELECT current_setting('server_encoding'), current_setting('search_path'), coalesce(current_schema(), '')`).
		Scan(&encoding, &path, &schema)
	switch {
	case err != nil:
		return fmt.Errorf("inspect the session: %w", err)
	case encoding != "UTF8":
		return fmt.Errorf("the encoding of database %s is %s, but messages may contain any text: "+
			"create the database with ENCODING 'UTF8'", conn.Config().Database, encoding)
	case schema != "public":
		return fmt.Errorf("search_path is %q, so tables would be created in schema %q, but this service needs public: "+
			"RESET search_path for the database and role %s", path, schema, conn.Config().User)
	}
	return nil
}

var (
	// ErrNoSchema means that no migration was ever applied.
	ErrNoSchema = errors.New("there is no schema in this database")
	// ErrPending means that some migrations of this binary are not applied.
	ErrPending = errors.New("migrations of this binary are not applied")
)

// Check returns ErrNoSchema or ErrPending unless all migrations of this binary are applied. ErrPending names the
// missing ones. Additional migrations belong to a newer version and are fine: old processes continue with a newer
// schema.
func Check(ctx context.Context, db *pgxpool.Pool) error {
	var never bool
	if err := db.QueryRow(ctx, `SELECT to_regclass('public.goose_db_version') IS NULL`).Scan(&never); err != nil {
		return fmt.Errorf("look for a schema: %w", err)
	}
	if never {
		return ErrNoSchema
	}
	rows, err := db.Query(ctx, `
		SELECT version FROM unnest($1::bigint[]) AS version
		WHERE NOT EXISTS (SELECT FROM public.goose_db_version WHERE version_id = version AND is_applied)`, versions())
	var missing []int64
	if err == nil {
		missing, err = pgx.CollectRows(rows, pgx.RowTo[int64])
	}
	if err != nil {
		return fmt.Errorf("read the schema's version: %w", err)
	}
	if len(missing) > 0 {
		return fmt.Errorf("%w: %d", ErrPending, missing)
	}
	return nil
}

// versions returns the numbers of the migrations in FS.
var versions = sync.OnceValue(func() (numbers []int64) {
	names, err := fs.Glob(FS, "*.sql")
	for _, name := range names {
		number, failed := goose.NumericComponent(name)
		numbers, err = append(numbers, number), errors.Join(err, failed)
	}
	if err != nil {
		panic("migrations: " + err.Error()) // goose would refuse the name as well
	}
	return numbers
})

func newProvider(db *sql.DB) (*goose.Provider, error) {
	// Try once a second, for five minutes. By default, a process that does not get the lock at once waits at least five
	// seconds.
	locker, err := lock.NewPostgresSessionLocker(lock.WithLockTimeout(1, 300))
	if err != nil {
		return nil, fmt.Errorf("create migration lock: %w", err)
	}
	provider, err := goose.NewProvider(goose.DialectPostgres, db, FS, goose.WithSessionLocker(locker))
	if err != nil {
		return nil, fmt.Errorf("load migrations: %w", err)
	}
	return provider, nil
}
