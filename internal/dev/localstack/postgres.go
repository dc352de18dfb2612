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

	// answerPatience bounds the answer of a running server. A slower one counts as
	// stuck and is replaced.
	answerPatience = 5 * time.Second
)

// postgres is the Postgres of an instance.
type postgres struct {
	*instance
	programs programs
	account  *account
}

// postgresURL returns the superuser's URL of a database.
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

// start stops an old server and starts a new one that answers.
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

// initialise makes the data directory unless it exists. It renames the directory only
// when it is complete, so that an incomplete one is never used.
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
	argv := []string{
		p.programs.initdb(), "-D", building, "-U", postgresUser, "-A", "trust", "-E", "UTF8", "--locale=C",
	}
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

// removePIDFile removes the pid file of a killed postmaster. A new postmaster normally
// does so, but not if another process now has the old pid. Two checks ensure that the
// old server has ended: our record before this, and the new postmaster, which refuses
// shared memory that is still in use.
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

// createDatabase creates the service's database.
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
