package main

import (
	"fmt"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"example.com/shop/internal/dev/testenv"
)

// A process is not ready while the schema lacks one of its migrations, and becomes ready when it is applied. Unknown
// migrations that do not break this version do not matter.
func TestTheSchemaDecidesOnReadiness(t *testing.T) {
	f := newFixture(t)
	f.exec(`CREATE TABLE kept AS SELECT * FROM goose_core_version WHERE version_id = 2`)
	f.exec(`DELETE FROM goose_core_version WHERE version_id = 2`)
	f.exec(`INSERT INTO goose_core_version (version_id, is_applied) VALUES (9999, true)`)
	f.exec(`INSERT INTO goose_db_version (version_id, is_applied) VALUES (9999, true)`)
	p := startProcess(t, "api", "POSTGRES_URL="+testenv.As(t, f.Config().ConnString(), "shop_api"))
	p.checkLog = func(log string) {
		if !strings.Contains(log, "the schema is too old: core/0002_inbox.sql is not applied: run `shop migrate`") {
			t.Errorf("the log is\n%s", log)
		}
	}
	p.await(t, "schema")
	f.exec(`INSERT INTO goose_core_version SELECT * FROM kept`)
	p.await(t)
}

// operatorCommands are commands that need a schema. The IDs and names in them need not exist.
var operatorCommands = []string{
	"outbox status", "outbox repair", "outbox shards", "outbox shards 2", "outbox replay --dry-run", "outbox replay",
	"dead list", "dead show 1", "dead redrive --id=1 --reason=x", "dead discard --id=1 --reason=x",
	"dead reopen 1 --reason=x", "trace x", "consumer ls", "consumer pause probes --reason=x",
	"consumer resume probes --reason=x", "consumer skip probes k --reason=x", "consumer park probes k --reason=x",
}

// Every process ends and every command refuses to work, with one line that says what helps, if a migration is applied
// that breaks this version, or one that has other content than this version's.
func TestAWrongSchemaIsRefusedInOneLine(t *testing.T) {
	f := newFixture(t)
	roles := map[string]string{"all": "shop_all"}
	for _, process := range startOrder {
		roles[process.name] = process.role
	}
	for _, test := range []struct{ change, line, undo string }{
		{`INSERT INTO goose_core_version (version_id, is_applied, name, breaks)
			VALUES (9999, true, 'core/9999_drop.sql', 9998)`,
			`the schema is too new: core/9999_drop\.sql breaks versions without core/9998, and this one supports the schema ` +
				"up to core/\\d{4}: deploy a newer version",
			`DELETE FROM goose_core_version WHERE version_id = 9999`},
		{`UPDATE goose_core_version SET sha256 = 'x' || sha256 WHERE version_id = 1`,
			`the schema is another one: core/0001_outbox\.sql is not the file that was applied: restore the file and put ` +
				"the change into a new migration, or use a new database",
			`UPDATE goose_core_version SET sha256 = substr(sha256, 2)  WHERE version_id = 1`},
	} {
		f.exec(test.change)
		last := regexp.MustCompile("(?m)^shop: " + test.line + "\n\\z")
		for name, role := range roles {
			status, _, stderr := call(t, []string{
				"POSTGRES_URL=" + testenv.As(t, f.Config().ConnString(), role), "AMQP_URL=" + f.amqpURL,
				"LISTEN=" + testenv.FreeAddress(t), "OPS_LISTEN=" + testenv.FreeAddress(t), "INSECURE_NO_AUTH=true",
				"CONSOLE_ADDR=" + testenv.FreeAddress(t),
			}, name)
			if status != 1 || !last.MatchString(stderr) {
				t.Errorf("%s: exit status %d\n%s", name, status, stderr)
			}
		}
		for _, args := range operatorCommands {
			f.wantOutput(1, args, "^shop: "+test.line+"\n$")
		}
		f.wantOutput(1, "doctor", `schema +wrong +`+strings.SplitAfter(test.line, ":")[0])
		owner := []string{"POSTGRES_URL=" + f.Config().ConnString()}
		if status, stdout, stderr := call(t, owner, "migrate"); status != 1 || stdout != "" || !last.MatchString(stderr) {
			t.Errorf("migrate: exit status %d\n%s%s", status, stdout, stderr)
		}
		f.exec(test.undo)
	}
	f.exec(`DELETE FROM goose_core_version WHERE version_id = 2`)
	for _, args := range operatorCommands {
		f.wantOutput(1, args, "^shop: the schema is too old: core/0002_inbox.sql is not applied: run `shop migrate`\n$")
	}
}

// A migrate that is killed leaves a schema that the next one completes: each migration is applied as a whole, with its
// record, or not at all.
func TestMigrateIsKilledHalfway(t *testing.T) {
	f := newFixture(t)
	f.exec(`DROP SCHEMA public CASCADE`)
	f.exec(`CREATE SCHEMA public`)
	url := testenv.With(t, f.Config().ConnString(), "lock_timeout", "60s")
	blocker, err := f.Begin(t.Context())
	if err == nil {
		_, err = blocker.Exec(t.Context(), `CREATE TABLE inbox ()`) // core/0002_inbox.sql waits for this transaction
	}
	if err != nil {
		t.Fatal(err)
	}
	killed := exec.Command(binary(), "migrate")
	killed.Env = []string{"POSTGRES_URL=" + url}
	if err := killed.Start(); err != nil {
		t.Fatal(err)
	}
	testenv.Eventually(t, 20*time.Second, func() error {
		var waits bool
		err := f.QueryRow(t.Context(), `SELECT EXISTS (SELECT FROM pg_stat_activity
			WHERE datname = current_database() AND wait_event_type = 'Lock' AND query LIKE '%TABLE inbox %')`).Scan(&waits)
		if err == nil && !waits {
			err = fmt.Errorf("migrate does not wait for the lock")
		}
		return err
	})
	if err := killed.Process.Kill(); err != nil {
		t.Error(err)
	}
	_ = killed.Wait() // it was killed
	if err := blocker.Rollback(t.Context()); err != nil {
		t.Fatal(err)
	}
	f.wantRows("core/0001_outbox.sql", `SELECT name FROM goose_core_version WHERE version_id > 0`)
	status, stdout, stderr := call(t, []string{"POSTGRES_URL=" + url}, "migrate")
	applied := strings.Split(strings.TrimSpace(stdout), "\n")
	if status != 0 || applied[0] != "applied core/0002_inbox.sql" ||
		slices.Contains(applied, "applied core/0001_outbox.sql") {
		t.Fatalf("exit status %d\n%s%s", status, stdout, stderr)
	}
	f.wantRows("t", `SELECT (count(*) = count(DISTINCT version_id) AND bool_and(length(sha256) = 64))::text::char(1)
		FROM goose_core_version WHERE version_id > 0`)
	if status, stdout, stderr := call(t, []string{"POSTGRES_URL=" + url}, "migrate"); status != 0 ||
		stdout != "schema is up to date\n" {
		t.Errorf("exit status %d\n%s%s", status, stdout, stderr)
	}
}
