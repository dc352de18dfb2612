//go:build unix

package testenv

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"sync"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"example.com/shop/migrations"
)

// templateLock is an advisory lock in the maintenance database. It serializes the
// creation of templates. The number only has to be unique there.
const templateLock = 0x7e3b1a7e

// template is the migrated database that tests get copies of. Its name is a hash of
// the migrations, so that changed migrations get a new template. All test binaries on
// a server share it.
type template struct {
	once sync.Once
	name string
	err  error
}

// ensure makes the template unless it exists, and returns its name.
func (t *template) ensure(ctx context.Context, e *environment) (string, error) {
	t.once.Do(func() {
		if t.name, t.err = templateName(migrations.FS); t.err == nil {
			t.err = makeTemplate(ctx, e.maintenance, e.stack.PostgresURL, t.name)
		}
	})
	return t.name, t.err
}

func templateName(migrations fs.FS) (string, error) {
	hash := sha256.New()
	err := fs.WalkDir(migrations, ".", func(path string, entry fs.DirEntry, err error) error {
		if err != nil || entry.IsDir() {
			return err
		}
		content, err := fs.ReadFile(migrations, path)
		fmt.Fprintf(hash, "%s %d\n%s", path, len(content), content)
		return err
	})
	if err != nil {
		return "", fmt.Errorf("read migrations: %w", err)
	}
	return fmt.Sprintf("template_%.8x", hash.Sum(nil)), nil
}

// makeTemplate makes the template unless it exists. A lock excludes other processes.
func makeTemplate(ctx context.Context, maintenance *pgxpool.Pool, serverURL, name string) (err error) {
	conn, err := maintenance.Acquire(ctx)
	if err != nil {
		return fmt.Errorf("connect: %w", err)
	}
	defer conn.Release()
	if _, err := conn.Exec(ctx, `SELECT pg_advisory_lock($1)`, templateLock); err != nil {
		return fmt.Errorf("lock: %w", err)
	}
	defer func() {
		_, unlockErr := conn.Exec(context.WithoutCancel(ctx), `SELECT pg_advisory_unlock($1)`, templateLock)
		err = errors.Join(err, unlockErr)
	}()

	var ready bool
	err = conn.QueryRow(ctx, `SELECT datistemplate FROM pg_database WHERE datname = $1`, name).Scan(&ready)
	if err != nil && !errors.Is(err, pgx.ErrNoRows) {
		return fmt.Errorf("look for template: %w", err)
	}
	if ready {
		return nil
	}
	// Mark it as a template last. A killed test leaves an incomplete one without the
	// mark.
	for _, statement := range []string{
		"DROP DATABASE IF EXISTS " + quote(name) + " WITH (FORCE)",
		"CREATE DATABASE " + quote(name),
	} {
		if _, err := conn.Exec(ctx, statement); err != nil {
			return fmt.Errorf("create template: %w", err)
		}
	}
	if _, err := migrations.Up(ctx, databaseURL(serverURL, name)); err != nil {
		return err
	}
	if err := givePasswords(ctx, conn); err != nil {
		return err
	}
	// Forbid connections: a database with connections cannot be copied.
	_, err = conn.Exec(ctx, "ALTER DATABASE "+quote(name)+" WITH IS_TEMPLATE true ALLOW_CONNECTIONS false")
	if err != nil {
		return fmt.Errorf("mark template: %w", err)
	}
	return nil
}

// rolePassword is for servers that require passwords, as those in containers do.
const rolePassword = "testenv"

// givePasswords sets the passwords of the service's roles, so that tests can log in.
func givePasswords(ctx context.Context, conn *pgxpool.Conn) error {
	rows, err := conn.Query(ctx, `SELECT rolname FROM pg_roles WHERE rolname LIKE 'shop\_%'`)
	if err != nil {
		return fmt.Errorf("list roles: %w", err)
	}
	roles, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		return fmt.Errorf("list roles: %w", err)
	}
	for _, role := range roles {
		if _, err := conn.Exec(ctx, "ALTER ROLE "+quote(role)+" PASSWORD '"+rolePassword+"'"); err != nil {
			return fmt.Errorf("set password of role %s: %w", role, err)
		}
	}
	return nil
}
