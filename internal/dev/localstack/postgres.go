//go:build unix

package localstack

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/jackc/pgx/v5"
)

const (
	postgresName = "postgres"
	postgresUser = "postgres"

	// answerPatience is how long a running server may take to answer before it
	// counts as wedged and is replaced.
	answerPatience = 5 * time.Second
)

// postgres is the Postgres of an instance.
type postgres struct {
	*instance
	programs programs
	account  *account
}

// postgresURL is the superuser's URL of a database.
func postgresURL(port int, database string) string {
	return fmt.Sprintf("postgres://%s@%s/%s?sslmode=disable", postgresUser, loopback(port), database)
}

func (p *postgres) running(ctx context.Context) bool {
	if _, alive := p.recorded(postgresName); !alive {
		return false
	}
	ctx, cancel := context.WithTimeout(ctx, answerPatience)
	defer cancel()
	return p.answers(ctx, "shop") == nil
}

// start replaces whatever is there by a server that answers.
func (p *postgres) start(ctx context.Context) error {
	if err := p.halt(postgresName, p.profile.postgresStop()); err != nil {
		return err
	}
	if err := p.initialise(ctx); err != nil {
		return err
	}
	return p.boot(ctx, postgresName, p.attempt)
}

func (p *postgres) dataDir() string { return filepath.Join(p.state.Data, "postgres") }

// initialise makes the data directory unless there is one. It is made under
// another name, so that a half-made one is never taken for a whole one.
func (p *postgres) initialise(ctx context.Context) error {
	dir, building := p.dataDir(), p.dataDir()+".new"
	stale := []string{building}
	if p.profile.throwaway {
		stale = append(stale, dir)
	} else if _, err := os.Stat(dir); err == nil {
		return p.removePIDFile()
	}
	for _, path := range stale {
		if err := os.RemoveAll(path); err != nil {
			return fmt.Errorf("remove old data: %w", err)
		}
	}
	if err := os.Mkdir(building, 0o700); err != nil {
		return fmt.Errorf("make data folder: %w", err)
	}
	if err := p.account.own(building); err != nil {
		return fmt.Errorf("make data folder: %w", err)
	}
	argv := []string{p.programs.initdb(), "-D", building, "-U", postgresUser, "-A", "trust", "-E", "UTF8", "--locale=C"}
	if p.primary != "" {
		argv = []string{p.programs.basebackup(), "-D", building, "-d", p.primary, "-R", "-c", "fast"}
	}
	if p.profile.throwaway {
		argv = append(argv, "--no-sync")
	}
	if err := runAs(ctx, p.account, argv...); err != nil {
		return err
	}
	if err := os.Rename(building, dir); err != nil {
		return fmt.Errorf("put data folder in place: %w", err)
	}
	return nil
}

// removePIDFile removes what a killed postmaster left. A new one would normally do
// so itself, but not if the old pid means another process by now. That the old
// server is really gone is checked twice: by our record before this, and by the new
// postmaster, which refuses shared memory that is still in use.
func (p *postgres) removePIDFile() error {
	err := os.Remove(filepath.Join(p.dataDir(), "postmaster.pid"))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("remove stale pid file: %w", err)
	}
	return nil
}

func (p *postgres) attempt(ctx context.Context) error {
	if err := p.setPorts(&p.state.Postgres); err != nil {
		return err
	}
	argv := []string{p.programs.postgres(), "-D", p.dataDir(), "-p", strconv.Itoa(p.state.Postgres)}
	for _, setting := range append(postgresSettings, p.profile.postgres...) {
		argv = append(argv, "-c", setting)
	}
	server, err := p.spawn(command{
		name:    postgresName,
		argv:    argv,
		env:     serverEnv(p.dataDir()),
		dir:     p.dataDir(),
		account: p.account,
	})
	if err != nil {
		return err
	}
	err = waitFor(ctx, server, bootPatience, func(ctx context.Context) error { return p.answers(ctx, "postgres") })
	if err == nil {
		err = p.createDatabase(ctx)
	}
	if err != nil {
		return errors.Join(err, p.halt(postgresName, stopAtOnce))
	}
	return nil
}

func (p *postgres) answers(ctx context.Context, database string) error {
	conn, err := pgx.Connect(ctx, postgresURL(p.state.Postgres, database))
	if err != nil {
		return err
	}
	return conn.Close(ctx)
}

// createDatabase makes the database that the service uses.
func (p *postgres) createDatabase(ctx context.Context) error {
	conn, err := pgx.Connect(ctx, postgresURL(p.state.Postgres, "postgres"))
	if err != nil {
		return fmt.Errorf("create database: %w", err)
	}
	defer conn.Close(context.WithoutCancel(ctx))
	var exists bool
	err = conn.QueryRow(ctx, `SELECT EXISTS (SELECT FROM pg_database WHERE datname = 'shop')`).Scan(&exists)
	if err == nil && !exists {
		_, err = conn.Exec(ctx, `CREATE DATABASE shop`)
	}
	if err != nil {
		return fmt.Errorf("create database: %w", err)
	}
	return nil
}
