package migrations_test

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/fstest"
	"time"

	"example.com/shop/internal/dev/testenv"
	"example.com/shop/migrations"
	"github.com/jackc/pgx/v5/pgxpool"
)

// with returns the migrations of this binary, and further ones that run the given SQL. A text with a leading mark has
// it above "-- +goose Up".
func with(t *testing.T, more map[string]string) fstest.MapFS {
	t.Helper()
	all := fstest.MapFS{}
	err := fs.WalkDir(migrations.FS, ".", func(name string, entry fs.DirEntry, err error) error {
		if err != nil || entry.IsDir() {
			return err
		}
		text, err := fs.ReadFile(migrations.FS, name)
		all[name] = &fstest.MapFile{Data: text}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	for name, text := range more {
		mark := ""
		if strings.HasPrefix(text, "-- breaks") {
			mark, text, _ = strings.Cut(text, "\n")
		}
		all[name] = &fstest.MapFile{Data: []byte(mark + "\n-- +goose Up\n" + text + ";\n")}
	}
	return all
}

// wantUp migrates with the files and compares the names of what was applied.
func wantUp(t *testing.T, db *pgxpool.Pool, files fs.FS, want ...string) {
	t.Helper()
	applied, err := migrations.UpFrom(t.Context(), db.Config().ConnString(), files)
	if err != nil || !slices.Equal(applied, want) {
		t.Fatalf("applied %q, %v, want %q", applied, err, want)
	}
}

// wantRefusal expects that a binary with the files refuses the schema with one line, whatever it tries: to migrate and
// to work.
func wantRefusal(t *testing.T, db *pgxpool.Pool, files fs.FS, reason error, line string) {
	t.Helper()
	applied, up := migrations.UpFrom(t.Context(), db.Config().ConnString(), files)
	if len(applied) > 0 {
		t.Errorf("applied %q", applied)
	}
	for _, err := range []error{up, migrations.CheckFrom(t.Context(), db, files)} {
		if !errors.Is(err, reason) || !migrations.IsFinal(err) || err.Error() != line {
			t.Errorf("got  %v\nwant %s", err, line)
		}
	}
}

func wantFits(t *testing.T, db *pgxpool.Pool, files fs.FS) {
	t.Helper()
	if err := migrations.CheckFrom(t.Context(), db, files); err != nil {
		t.Error(err)
	}
}

// A database in which a core migration was applied with other content is refused before anything is applied.
func TestAnEditedCoreMigrationIsRefused(t *testing.T) {
	t.Parallel()
	db := testenv.Postgres(t)
	edited := with(t, map[string]string{"core/9001_more.sql": "CREATE TABLE more ()"})
	text := &edited["core/0002_inbox.sql"].Data
	*text = append(*text, "-- another comment\n"...)
	wantRefusal(t, db, edited, migrations.ErrChanged, "the schema is another one: core/0002_inbox.sql is not the file "+
		"that was applied: restore the file and put the change into a new migration, or use a new database")
	wantFits(t, db, migrations.FS)
}

// The service's own migrations may be edited: they are not applied again, and Up warns of each. Not parallel, because
// it replaces the default logger.
func TestAnEditedOwnMigrationIsNamed(t *testing.T) {
	db := testenv.Postgres(t)
	wantUp(t, db, with(t, map[string]string{"9001_own.sql": "CREATE TABLE own ()"}), "9001_own.sql")
	var log bytes.Buffer
	before := slog.Default()
	slog.SetDefault(slog.New(slog.NewTextHandler(&log, nil)))
	defer slog.SetDefault(before)
	edited := with(t, map[string]string{"9001_own.sql": "CREATE TABLE another ()", "9002_own.sql": "SELECT 1"})
	wantUp(t, db, edited, "9002_own.sql")
	renamed := with(t, map[string]string{"9001_renamed.sql": "CREATE TABLE own ()", "9002_own.sql": "SELECT 1"})
	wantUp(t, db, renamed)
	if !strings.Contains(log.String(), "edited after it was applied") || !strings.Contains(log.String(), "9001_own.sql") {
		t.Errorf("the log is %q", &log)
	}
	wantFits(t, db, edited)
}

// Two branches may have used one number. The second file is not taken for an edited version of the first.
func TestAnOwnMigrationUnderATakenNumberIsRefused(t *testing.T) {
	t.Parallel()
	db := testenv.Postgres(t)
	wantUp(t, db, with(t, map[string]string{"9001_theirs.sql": "CREATE TABLE theirs ()"}), "9001_theirs.sql")
	wantRefusal(t, db, with(t, map[string]string{"9001_ours.sql": "CREATE TABLE ours ()"}), migrations.ErrChanged,
		"the schema is another one: 9001_ours.sql is not applied, but 9001_theirs.sql has its number: "+
			"give the file another number")
}

// The core's numbers may have gaps, and a missing one may be applied late. The service's own may not: an own migration
// may depend on all with lower numbers.
func TestOnlyTheCoreAppliesLowerNumbersLate(t *testing.T) {
	t.Parallel()
	db := testenv.Postgres(t)
	files := map[string]string{"core/9001_a.sql": "CREATE TABLE a ()", "core/9003_c.sql": "CREATE TABLE c ()"}
	wantUp(t, db, with(t, files), "core/9001_a.sql", "core/9003_c.sql")
	files["core/9002_b.sql"], files["core/9004_d.sql"] = "CREATE TABLE b ()", "CREATE TABLE d ()"
	if err := migrations.CheckFrom(t.Context(), db, with(t, files)); !errors.Is(err, migrations.ErrTooOld) ||
		err.Error() != "the schema is too old: core/9002_b.sql and 1 more are not applied: run `shop migrate`" {
		t.Error(err)
	}
	wantUp(t, db, with(t, files), "core/9002_b.sql", "core/9004_d.sql")
	wantUp(t, db, with(t, files))

	files["9002_own.sql"] = "SELECT 1"
	wantUp(t, db, with(t, files), "9002_own.sql")
	files["9001_own.sql"] = "SELECT 1"
	if applied, err := migrations.UpFrom(t.Context(), db.Config().ConnString(), with(t, files)); err == nil ||
		len(applied) > 0 || !strings.Contains(err.Error(), "9001") {
		t.Errorf("applied %q, %v", applied, err)
	}
}

// N and N-1 run together: a binary accepts a newer schema, unless a migration is marked as breaking it. N-1 knows the
// number in the mark, N-2 does not.
func TestABinaryAcceptsANewerSchemaUntilItBreaks(t *testing.T) {
	t.Parallel()
	for _, folder := range []string{"core/", ""} {
		db := testenv.Postgres(t)
		files := map[string]string{folder + "9000_base.sql": "CREATE TABLE kept (old int)"}
		oldest := with(t, files)
		files[folder+"9001_expand.sql"] = "ALTER TABLE kept ADD COLUMN new int NOT NULL DEFAULT 0"
		before := with(t, files)
		wantUp(t, db, before, folder+"9000_base.sql", folder+"9001_expand.sql")
		wantFits(t, db, oldest)
		wantUp(t, db, oldest)

		files[folder+"9002_contract.sql"] = "-- breaks: 9001\nALTER TABLE kept DROP COLUMN old"
		wantUp(t, db, with(t, files), folder+"9002_contract.sql")
		wantFits(t, db, before)
		wantUp(t, db, before)
		wantRefusal(t, db, oldest, migrations.ErrTooNew, "the schema is too new: "+folder+"9002_contract.sql breaks "+
			"versions without "+folder+"9001, and this one supports the schema up to "+folder+"9000: "+
			"deploy a newer version")
	}
}

func TestAMarkMustNameAMigration(t *testing.T) {
	t.Parallel()
	for mark, valid := range map[string]bool{
		"-- breaks: 9001": true, "-- breaks: 0001": true, "-- it breaks: nothing": true, "-- breaksame": true,
		"-- breaks 9001": false, "-- breaks:": false, "-- breaks: 9002": false, "-- breaks: 0": false,
		"-- breaks: core/0001": false, "--breaks: x": false, "-- Breaks: x": false, "-- breaks: 1\n-- breaks: 2": false,
	} {
		files := fstest.MapFS{"core/9001_a.sql": {Data: []byte(mark + "\n-- +goose Up\nSELECT 1;\n")}}
		_, err := migrations.UpFrom(t.Context(), "postgres://u@127.0.0.1:1/d", files)
		named := err != nil && strings.Contains(err.Error(), "core/9001_a.sql") && !strings.Contains(err.Error(), "\n")
		if named == valid {
			t.Errorf("%q: %v", mark, err)
		}
	}
}

// The version table of another program, or of this one from before the sets were separated, is left alone.
func TestTheVersionTableOfAnotherProgramIsRefused(t *testing.T) {
	t.Parallel()
	db := testenv.Postgres(t)
	empty(t, db)
	if _, err := db.Exec(t.Context(), `CREATE TABLE goose_db_version (id int, version_id bigint, is_applied boolean);
		INSERT INTO goose_db_version VALUES (1, 0, true), (2, 4, true)`); err != nil {
		t.Fatal(err)
	}
	wantRefusal(t, db, migrations.FS, migrations.ErrForeign, "the schema is not this service's: it has goose_db_version "+
		"but no goose_core_version, like that of another program, or of this one before version 0.1.0: "+
		"use a new database")
}

// goose's own tools may apply the service's migrations. They store no checksum, which then does not count.
func TestVersionsOfGoosesOwnToolsCount(t *testing.T) {
	t.Parallel()
	db := testenv.Postgres(t)
	_, err := db.Exec(t.Context(), `INSERT INTO goose_db_version (version_id, is_applied) VALUES (9001, true)`)
	if err != nil {
		t.Fatal(err)
	}
	files := with(t, map[string]string{"9001_own.sql": "SELECT 1/0"})
	wantUp(t, db, files)
	wantFits(t, db, files)
}

// A new service has no migrations of its own.
func TestAServiceWithoutMigrationsOfItsOwn(t *testing.T) {
	t.Parallel()
	db := testenv.Postgres(t)
	empty(t, db)
	files := with(t, nil)
	for name := range files {
		if !strings.HasPrefix(name, "core/") {
			delete(files, name)
		}
	}
	applied, err := migrations.UpFrom(t.Context(), db.Config().ConnString(), files)
	if err != nil || len(applied) != len(files) {
		t.Fatalf("applied %q, %v", applied, err)
	}
	wantFits(t, db, files)
	files["0001_first.sql"] = &fstest.MapFile{Data: []byte("-- +goose Up\nSELECT 1;\n")}
	wantUp(t, db, files, "0001_first.sql")
}

// If a migration fails, those before it stay applied, it leaves nothing behind, and its file may still change.
func TestAFailedMigrationLeavesNothingBehind(t *testing.T) {
	t.Parallel()
	db := testenv.Postgres(t)
	files := map[string]string{
		"core/9001_a.sql": "CREATE TABLE a ()", "core/9002_b.sql": "CREATE TABLE b (); SELECT 1/0",
		"core/9003_c.sql": "CREATE TABLE c ()", "9001_own.sql": "CREATE TABLE own ()",
	}
	applied, err := migrations.UpFrom(t.Context(), db.Config().ConnString(), with(t, files))
	if err == nil || !strings.Contains(err.Error(), "core/9002_b.sql: ERROR: division by zero") ||
		!slices.Equal(applied, []string{"core/9001_a.sql"}) {
		t.Fatalf("applied %q, %v", applied, err)
	}
	files["core/9002_b.sql"] = "CREATE TABLE b ()"
	wantUp(t, db, with(t, files), "core/9002_b.sql", "core/9003_c.sql", "9001_own.sql")
	wantFits(t, db, with(t, files))
}

// One lock covers the comparison and both sets: a process that waits while another one breaks its version applies
// nothing afterwards.
func TestOneLockCoversBothSets(t *testing.T) {
	t.Parallel()
	db := testenv.Postgres(t)
	url := testenv.With(t, db.Config().ConnString(), "lock_timeout", "60s")
	if _, err := db.Exec(t.Context(), `CREATE TABLE gate ()`); err != nil {
		t.Fatal(err)
	}
	gate, err := db.Begin(t.Context())
	if err == nil {
		_, err = gate.Exec(t.Context(), `LOCK TABLE gate`)
	}
	if err != nil {
		t.Fatal(err)
	}
	var running sync.WaitGroup
	defer running.Wait()
	defer func() { _ = gate.Rollback(t.Context()) }()
	up := func(files fs.FS, reason error, want ...string) {
		running.Go(func() {
			applied, err := migrations.UpFrom(t.Context(), url, files)
			if !errors.Is(err, reason) || !slices.Equal(applied, want) {
				t.Errorf("applied %q, %v, want %q, %v", applied, err, want, reason)
			}
		})
	}
	await := func(query string) {
		t.Helper()
		testenv.Eventually(t, 20*time.Second, func() error {
			var found bool
			err := db.QueryRow(t.Context(), `SELECT EXISTS (SELECT FROM pg_stat_activity
				WHERE datname = current_database() AND pid <> pg_backend_pid() AND query LIKE $1)`, query).Scan(&found)
			if err == nil && !found {
				err = fmt.Errorf("no session runs %s", query)
			}
			return err
		})
	}
	files := map[string]string{
		"core/9001_new.sql": "-- breaks: 9001\nDROP TABLE gate", "9001_new.sql": "CREATE TABLE new ()",
	}
	up(with(t, files), nil, "core/9001_new.sql", "9001_new.sql")
	await(`%DROP TABLE gate%`)
	up(with(t, map[string]string{"9002_old.sql": "CREATE TABLE old ()"}), migrations.ErrTooNew)
	await(`SELECT pg_try_advisory_lock%`)
	if err := gate.Rollback(t.Context()); err != nil {
		t.Error(err)
	}
}

// The core's migrations are frozen: their checksums are listed, and a database stores the checksum of each that it has.
func TestTheCoresMigrationsAreFrozen(t *testing.T) {
	t.Parallel()
	db := testenv.Postgres(t)
	empty(t, db)
	if _, err := migrations.Up(t.Context(), db.Config().ConnString()); err != nil {
		t.Fatal(err)
	}
	list, err := os.ReadFile("core/SHA256SUMS")
	if err != nil {
		t.Fatal(err)
	}
	if !regexp.MustCompile(`^([0-9a-f]{64}  \d{4}_\w+\.sql\n)+$`).Match(list) {
		t.Errorf("core/SHA256SUMS has other lines than those of sha256sum:\n%s", list)
	}
	listed := map[string]string{}
	for line := range strings.Lines(string(list)) {
		sum, name, _ := strings.Cut(strings.TrimSpace(line), "  ")
		listed[name] = sum
	}
	rows, _ := db.Query(t.Context(), `SELECT name, sha256 FROM goose_core_version WHERE version_id > 0`)
	for rows.Next() {
		var name, sum string
		if err := rows.Scan(&name, &sum); err != nil {
			t.Fatal(err)
		}
		name = strings.TrimPrefix(name, "core/")
		switch listed[name] {
		case sum:
		case "":
			t.Errorf("core/SHA256SUMS does not list %[2]s; when its content is final, add the line\n%[1]s  %[2]s", sum, name)
		default:
			t.Errorf("core/%[2]s has changed. If a release or any database contains it, restore it, and put the change into "+
				"a new migration core/NNNN_NAME.sql. Otherwise change its line in core/SHA256SUMS to\n%[1]s  %[2]s", sum, name)
		}
		delete(listed, name)
	}
	if err := rows.Err(); err != nil || len(listed) > 0 {
		t.Errorf("core/SHA256SUMS lists files that do not exist: %v (%v)", listed, err)
	}
}
