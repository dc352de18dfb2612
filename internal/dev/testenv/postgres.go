//go:build unix

package testenv

import (
	"context"
	"fmt"
	"net/url"
	"regexp"
	"strings"
	"testing"
	"time"

	"example.com/shop/internal/session"
	"example.com/shop/migrations"
	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

// maxConns is more than pgx's default, the number of cores, so that a test can have
// several open transactions.
const maxConns = 16

// Postgres returns a pool on a new migrated database for the test. At the end of the
// test it closes the pool and drops the database. A connection that is not released
// by then fails the test.
func Postgres(t testing.TB) *pgxpool.Pool {
	t.Helper()
	return openPool(t, PostgresURL(t))
}

// OwnPostgres is [Postgres] on a private server. It also returns the folder of that server's programs, such as pg_dump,
// which have the server's version. It takes some seconds.
func OwnPostgres(t testing.TB) (db *pgxpool.Pool, programs string) {
	t.Helper()
	url, programs := Cluster(t)
	if _, err := migrations.Up(t.Context(), url); err != nil {
		t.Fatalf("migrate: %v", err)
	}
	return openPool(t, url), programs
}

// Preparing is [Postgres] on a server that allows prepared transactions: the shared server if it does, otherwise a
// private one.
func Preparing(t testing.TB) *pgxpool.Pool {
	t.Helper()
	var limit string
	if err := shared(t).maintenance.QueryRow(t.Context(), `SHOW max_prepared_transactions`).Scan(&limit); err != nil {
		t.Fatal(err)
	}
	if limit != "0" {
		return Postgres(t)
	}
	db, _ := OwnPostgres(t)
	return db
}

func openPool(t testing.TB, url string) *pgxpool.Pool {
	t.Helper()
	config, err := pgxpool.ParseConfig(url)
	if err != nil {
		t.Fatalf("parse url: %v", err)
	}
	config.MaxConns = maxConns
	if _, err := session.Pin(config.ConnConfig, session.Options{}); err != nil {
		t.Fatalf("set up session: %v", err)
	}
	pool, err := pgxpool.NewWithConfig(t.Context(), config)
	if err != nil {
		t.Fatalf("open pool: %v", err)
	}
	t.Cleanup(func() { closePool(t, pool) })
	return pool
}

// closePool waits for the release of all connections, up to callPatience. A leaked
// connection then fails the test by name, and not the whole binary with a timeout.
func closePool(t testing.TB, pool *pgxpool.Pool) {
	t.Helper()
	closed := make(chan struct{})
	go func() {
		defer close(closed)
		pool.Close()
	}()
	select {
	case <-closed:
	case <-time.After(callPatience):
		t.Errorf("close pool: %d connections were not released", pool.Stat().AcquiredConns())
	}
}

// PostgresURL returns the URL of a new migrated database for the test. It drops the
// database when the test ends, even if there are connections to it.
func PostgresURL(t testing.TB) string {
	t.Helper()
	e := shared(t)
	ctx, cancel := context.WithTimeout(t.Context(), startPatience)
	defer cancel()
	template, err := e.template.ensure(ctx, e)
	if err != nil {
		t.Fatalf("make template database: %v", err)
	}
	name := uniqueName(t)
	// FILE_COPY is faster than WAL_LOG here: 78 against 132 ms for create and drop
	// together, measured with four concurrent tests on two cores. It costs checkpoints,
	// which are nearly free without fsync.
	create := "CREATE DATABASE " + quote(name) + " TEMPLATE " + quote(template) + " STRATEGY FILE_COPY"
	if _, err := e.maintenance.Exec(ctx, create); err != nil {
		t.Fatalf("create database: %v", err)
	}
	t.Cleanup(func() {
		ctx, cancel := cleanupContext()
		defer cancel()
		if _, err := e.maintenance.Exec(ctx, "DROP DATABASE "+quote(name)+" WITH (FORCE)"); err != nil {
			t.Errorf("drop database: %v", err)
		}
	})
	return databaseURL(e.stack.PostgresURL, name)
}

// As returns a database's URL for one of the service's roles. It logs in as the role, because a superuser with SET ROLE
// could reset its role.
func As(t testing.TB, rawURL, role string) string {
	t.Helper()
	parsed, err := url.Parse(rawURL)
	if err != nil {
		t.Fatalf("parse postgres url: %v", err)
	}
	parsed.User = url.UserPassword(role, rolePassword)
	return parsed.String()
}

// Login returns a database's URL for a new superuser with this password. The server may ignore passwords: that depends
// on the servers that the environment names. The user is dropped when the test ends.
func Login(t testing.TB, rawURL, password string) string {
	t.Helper()
	parsed, err := url.Parse(rawURL)
	if err != nil {
		t.Fatalf("parse postgres url: %v", err)
	}
	name, maintenance := uniqueName(t), shared(t).maintenance
	var create string
	const statement = `SELECT format('CREATE ROLE %I SUPERUSER LOGIN PASSWORD %L', $1::text, $2::text)`
	err = maintenance.QueryRow(t.Context(), statement, name, password).Scan(&create)
	if err == nil {
		_, err = maintenance.Exec(t.Context(), create)
	}
	if err != nil {
		t.Fatalf("create user: %v", err)
	}
	t.Cleanup(func() { dropLogin(t, rawURL, name) })
	parsed.User = url.UserPassword(name, password)
	return parsed.String()
}

// dropLogin drops a user and the objects that it owns in the database.
func dropLogin(t testing.TB, rawURL, name string) {
	t.Helper()
	ctx, cancel := cleanupContext()
	defer cancel()
	conn, err := pgx.Connect(ctx, rawURL)
	if err != nil {
		t.Errorf("drop user: %v", err)
		return
	}
	defer conn.Close(ctx)
	if _, err := conn.Exec(ctx, "DROP OWNED BY "+quote(name)+"; DROP ROLE "+quote(name)); err != nil {
		t.Errorf("drop user: %v", err)
	}
}

// With returns a URL with one more parameter. The URL may already have others, depending on the environment.
func With(t testing.TB, rawURL, name, value string) string {
	t.Helper()
	parsed, err := url.Parse(rawURL)
	if err != nil {
		t.Fatalf("parse url: %v", err)
	}
	query := parsed.Query()
	query.Set(name, value)
	parsed.RawQuery = query.Encode()
	return parsed.String()
}

// openMaintenance connects to the database from which testenv creates others.
func openMaintenance(ctx context.Context, serverURL string) (*pgxpool.Pool, error) {
	config, err := pgxpool.ParseConfig(databaseURL(serverURL, "postgres"))
	if err != nil {
		return nil, fmt.Errorf("parse postgres url: %w", err)
	}
	// Each CREATE or DROP DATABASE keeps a core busy.
	config.MaxConns = 4
	pool, err := pgxpool.NewWithConfig(ctx, config)
	if err != nil {
		return nil, fmt.Errorf("open maintenance database: %w", err)
	}
	if err := pool.Ping(ctx); err != nil {
		pool.Close()
		return nil, fmt.Errorf("open maintenance database: %w", err)
	}
	return pool, nil
}

// databaseURL returns the URL of another database on the server.
func databaseURL(serverURL, name string) string {
	parsed, err := url.Parse(serverURL)
	if err != nil {
		panic("testenv: POSTGRES_URL is not a URL: " + err.Error())
	}
	parsed.Path = "/" + name
	return parsed.String()
}

var notInNames = regexp.MustCompile(`[^a-z0-9]+`)

// uniqueName returns a unique name that contains the name of the test, so that the
// servers' logs are readable. It fits the 63 bytes of a Postgres name.
func uniqueName(t testing.TB) string {
	name := strings.Trim(notInNames.ReplaceAllString(strings.ToLower(t.Name()), "_"), "_")
	return fmt.Sprintf("%.40s_%.16s", name, strings.ReplaceAll(uuid.NewString(), "-", ""))
}

func quote(name string) string { return pgx.Identifier{name}.Sanitize() }
