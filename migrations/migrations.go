// Package migrations contains the database schema as goose migrations, embedded into the binary.
//
// There are two sets, and each is numbered from 0001 on and has a version table of its own. The files in core/ are the
// core's: they come from the template and never change once released. The files beside this one are the service's. Up
// applies the core's first.
//
// Any number of processes may call Up at once: with a session-level advisory lock, one of them works while the others
// wait. Migrations need a direct connection, because a transaction-mode pooler has no sessions.
//
// Check decides whether a binary can work with the schema of a database; docs/upgrading.md explains the rule.
package migrations

import (
	"context"
	"database/sql"
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"

	"example.com/shop/internal/session"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/stdlib"
	"github.com/pressly/goose/v3"
	"github.com/pressly/goose/v3/database"
	"github.com/pressly/goose/v3/lock"
)

// FS contains the migrations of both sets, named core/NNNN_NAME.sql and NNNN_NAME.sql. The second pattern also matches
// README.md, because a pattern must match something and a new service has no migrations of its own.
//
//go:embed core/*.sql [0-9R]*
var FS embed.FS

// Up migrates the database at url to the newest version and returns the names of the migrations that it applied. It
// returns a Refusal, and changes nothing, if the schema does not fit this binary and no migration can help.
func Up(ctx context.Context, url string) (applied []string, err error) { return up(ctx, url, FS) }

func up(ctx context.Context, url string, files fs.FS) (applied []string, err error) {
	config, err := pgx.ParseConfig(url)
	if err != nil {
		return nil, fmt.Errorf("parse postgres url: %w", err)
	}
	sets, err := load(files)
	if err != nil {
		return nil, err
	}
	if err := check(ctx, config); err != nil {
		return nil, err
	}
	if _, err := session.Pin(config, session.Options{}); err != nil {
		return nil, err
	}
	db := stdlib.OpenDB(*config)
	defer db.Close()
	db.SetMaxOpenConns(1) // a session owns the lock, so lock and migrations share one
	locker, err := locked(ctx, db)
	if err != nil {
		return nil, err
	}
	defer unlock(ctx, db)
	if err := prepare(ctx, db, sets); err != nil {
		return nil, err
	}
	for _, s := range sets {
		names, err := s.up(ctx, db, locker)
		applied = append(applied, names...)
		if err != nil {
			return applied, err
		}
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

// locked takes the lock and returns its locker. The lock belongs to the one connection of db. goose takes it again for
// each set: that only counts, unless the connection broke and the new one does not have the lock yet.
func locked(ctx context.Context, db *sql.DB) (lock.SessionLocker, error) {
	// Try once a second, for five minutes. By default, a process that does not get the lock at once waits at least five
	// seconds.
	locker, err := lock.NewPostgresSessionLocker(lock.WithLockTimeout(1, 300))
	if err != nil {
		return nil, fmt.Errorf("create migration lock: %w", err)
	}
	conn, err := db.Conn(ctx)
	if err != nil {
		return nil, fmt.Errorf("connect: %w", err)
	}
	defer conn.Close()
	if err := locker.SessionLock(ctx, conn); err != nil {
		return nil, fmt.Errorf("wait for another migrate: %w", err)
	}
	return locker, nil
}

// unlock lets the next process in at once. The end of the session would do that a moment later, so errors do not count.
func unlock(ctx context.Context, db *sql.DB) {
	_, _ = db.ExecContext(context.WithoutCancel(ctx), `SELECT pg_advisory_unlock_all()`)
}

// prepare refuses a schema that this binary does not fit, and then makes the version tables of all sets, since the
// core's first migration grants rights on them.
func prepare(ctx context.Context, db *sql.DB, sets []*set) (err error) {
	conn, err := db.Conn(ctx)
	if err != nil {
		return fmt.Errorf("connect: %w", err)
	}
	defer func() { err = errors.Join(err, conn.Close()) }()
	return conn.Raw(func(driver any) error {
		conn := driver.(*stdlib.Conn).Conn()
		edited, err := compare(ctx, conn, sets)
		if err != nil && !errors.Is(err, ErrNoSchema) && !errors.Is(err, ErrTooOld) {
			return err
		}
		for _, name := range edited {
			slog.WarnContext(ctx, "this migration was edited after it was applied, and is not applied again",
				"migration", name)
		}
		for _, s := range sets {
			if _, err := conn.Exec(ctx, fmt.Sprintf(tableSQL, s.table)); err != nil {
				return fmt.Errorf("create table %s: %w", s.table, err)
			}
		}
		return nil
	})
}

// tableSQL makes a version table. The first four columns are goose's, and version 0 is the row with which its tables
// begin, so its own tools can work with the table.
const tableSQL = `
CREATE TABLE IF NOT EXISTS %[1]s (
    id         integer   GENERATED BY DEFAULT AS IDENTITY PRIMARY KEY,
    version_id bigint    NOT NULL,
    is_applied boolean   NOT NULL,
    tstamp     timestamp NOT NULL DEFAULT now(),
    name       text      NOT NULL DEFAULT '',
    sha256     text      NOT NULL DEFAULT '',
    breaks     bigint    NOT NULL DEFAULT 0
);
INSERT INTO %[1]s (version_id, is_applied) SELECT 0, true WHERE NOT EXISTS (SELECT FROM %[1]s)`

// up applies the missing migrations of the set and returns their names.
func (s *set) up(ctx context.Context, db *sql.DB, locker lock.SessionLocker) (applied []string, err error) {
	if len(s.files) == 0 {
		return nil, nil
	}
	base, err := database.NewStore(database.DialectPostgres, s.table)
	if err != nil {
		return nil, fmt.Errorf("load migrations: %w", err)
	}
	provider, err := goose.NewProvider(goose.DialectCustom, db, s.fsys, goose.WithStore(&store{base, s}),
		goose.WithSessionLocker(locker), goose.WithAllowOutofOrder(s.core))
	if err != nil {
		return nil, fmt.Errorf("load migrations: %w", err)
	}
	results, err := provider.Up(ctx)
	if partial := new(goose.PartialError); errors.As(err, &partial) {
		results, err = partial.Applied, fmt.Errorf("%s%s: %w", s.folder, partial.Failed.Source.Path, partial.Err)
	}
	for _, result := range results {
		applied = append(applied, s.folder+result.Source.Path)
	}
	if err != nil {
		return applied, fmt.Errorf("migrate: %w", err)
	}
	return applied, nil
}

// store records the name, the checksum and the mark of a migration with its version. goose calls Insert in the
// transaction of the migration, so each migration and its record commit together.
type store struct {
	database.Store
	set *set
}

func (s *store) Insert(ctx context.Context, db database.DBTxConn, request database.InsertRequest) error {
	m := s.set.files[request.Version]
	_, err := db.ExecContext(ctx, `INSERT INTO `+s.set.table+` (version_id, is_applied, name, sha256, breaks)
		VALUES ($1, true, $2, $3, $4)`, request.Version, m.name, m.sum, m.breaks)
	if err != nil {
		return fmt.Errorf("record %s: %w", m.name, err)
	}
	return nil
}
