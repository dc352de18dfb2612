package migrations_test

import (
	"errors"
	"io/fs"
	neturl "net/url"
	"slices"
	"strings"
	"sync"
	"testing"

	"example.com/shop/internal/dev/testenv"
	"example.com/shop/migrations"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/jackc/pgx/v5/stdlib"
	"github.com/pressly/goose/v3"
)

func TestMain(m *testing.M) { testenv.Main(m) }

func TestUpAppliesEachMigrationOnce(t *testing.T) {
	t.Parallel()
	db := testenv.Postgres(t)
	empty(t, db)
	url := db.Config().ConnString()
	var mu sync.Mutex
	var all []string
	var racing sync.WaitGroup
	for range 4 {
		racing.Go(func() {
			applied, err := migrations.Up(t.Context(), url)
			if err != nil {
				t.Error(err)
			}
			mu.Lock()
			defer mu.Unlock()
			all = append(all, applied...)
		})
	}
	racing.Wait()
	slices.Sort(all)
	distinct := slices.Compact(slices.Clone(all))
	core, err := fs.Glob(migrations.FS, "core/*.sql")
	own, failed := fs.Glob(migrations.FS, "*.sql")
	if files := append(own, core...); errors.Join(err, failed) != nil || !slices.Equal(distinct, files) ||
		len(distinct) != len(all) {
		t.Errorf("applied %v, want %v", all, files)
	}
	if again, err := migrations.Up(t.Context(), url); err != nil || len(again) > 0 {
		t.Errorf("applied %v again (%v)", again, err)
	}
}

func TestDownUndoesEverything(t *testing.T) {
	t.Parallel()
	pool := testenv.Postgres(t)
	db := stdlib.OpenDBFromPool(pool)
	defer db.Close()
	down := func(files fs.FS, table string) {
		t.Helper()
		provider, err := goose.NewProvider(goose.DialectPostgres, db, files, goose.WithTableName(table))
		if err == nil {
			_, err = provider.DownTo(t.Context(), 0)
		}
		if err != nil && !errors.Is(err, goose.ErrNoMigrations) {
			t.Fatal(err)
		}
	}
	down(migrations.FS, "goose_db_version")
	core, err := fs.Sub(migrations.FS, "core")
	if err != nil {
		t.Fatal(err)
	}
	down(core, "goose_core_version")
	var left []string
	err = pool.QueryRow(t.Context(), `
		SELECT coalesce(array_agg(name), '{}') FROM (
			SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relname NOT LIKE 'goose%'
			UNION ALL SELECT proname FROM pg_proc WHERE pronamespace = 'public'::regnamespace
		) AS left_behind (name)`).Scan(&left)
	if err != nil || len(left) > 0 {
		t.Errorf("left behind: %v (%v)", left, err)
	}
	if applied, err := migrations.Up(t.Context(), pool.Config().ConnString()); err != nil || len(applied) < 2 {
		t.Errorf("up again: applied %v, %v", applied, err)
	}
}

func empty(t *testing.T, db *pgxpool.Pool) {
	t.Helper()
	if _, err := db.Exec(t.Context(), `DROP SCHEMA public CASCADE; CREATE SCHEMA public`); err != nil {
		t.Fatal(err)
	}
}

// Up refuses a database in which the service cannot work before it writes anything.
func TestUpRefusesWhatItCannotWorkIn(t *testing.T) {
	t.Parallel()
	db := testenv.Postgres(t)
	empty(t, db)
	url, name := db.Config().ConnString(), db.Config().ConnConfig.Database
	exec := func(sql string) {
		t.Helper()
		if _, err := db.Exec(t.Context(), sql); err != nil {
			t.Fatal(err)
		}
	}
	wantRefused := func(url, because string) {
		t.Helper()
		_, err := migrations.Up(t.Context(), url)
		if err == nil || !strings.Contains(err.Error(), because) || strings.Contains(err.Error(), "\n") {
			t.Errorf("got error %v, want one line with %q", err, because)
		}
	}
	exec(`CREATE SCHEMA app`)
	exec(`ALTER DATABASE ` + pgx.Identifier{name}.Sanitize() + ` SET search_path = app, public`)
	wantRefused(url, `search_path is "app, public"`)
	wantRefused(testenv.With(t, url, "search_path", "nowhere"), `search_path is "nowhere"`)
	exec(`ALTER DATABASE ` + pgx.Identifier{name}.Sanitize() + ` RESET search_path`)

	latin := name[:min(len(name), 50)] + "_latin1"
	exec(`CREATE DATABASE ` + pgx.Identifier{latin}.Sanitize() + ` ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0`)
	defer exec(`DROP DATABASE ` + pgx.Identifier{latin}.Sanitize() + ` WITH (FORCE)`)
	parsed, err := neturl.Parse(url)
	if err != nil {
		t.Fatal(err)
	}
	parsed.Path = "/" + latin
	wantRefused(parsed.String(), `is LATIN1`)

	if applied, err := migrations.Up(t.Context(), url); err != nil || len(applied) == 0 {
		t.Errorf("afterwards: applied %v, %v", applied, err)
	}
}
