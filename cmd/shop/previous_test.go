package main

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"example.com/shop/internal/dev/testenv"
)

// These tests try the rules of docs/upgrading.md on the previous release, if there is one: the newest tag vX.Y.Z before
// this commit.

var root = filepath.Join("..", "..")

func git(args ...string) (string, error) {
	output, err := exec.Command("git", append([]string{"-C", root}, args...)...).CombinedOutput()
	if err != nil {
		err = errors.New(string(output))
	}
	return strings.TrimSpace(string(output)), err
}

// previousRelease returns the tag of the previous release, or "" if there is none. CI must not miss one.
func previousRelease(t *testing.T) string {
	t.Helper()
	if _, err := os.Stat(filepath.Join(root, ".git")); err != nil {
		return "" // a tree without a history, such as gonew's
	}
	shallow, err := git("rev-parse", "--is-shallow-repository")
	if err == nil && shallow == "true" && os.Getenv("GITHUB_ACTIONS") != "" {
		t.Fatal("this clone has no history, so it may lack the tag of the previous release: fetch all, with fetch-depth: 0")
	}
	var tags string
	if err == nil {
		tags, err = git("tag", "--merged=HEAD", "--no-contains=HEAD", "--sort=-version:refname", "v*")
	}
	if err != nil {
		t.Fatalf("look for the previous release: %v", err)
	}
	return regexp.MustCompile(`(?m)^v\d+\.\d+\.\d+$`).FindString(tags)
}

// A release never changes the migrations of the core that an earlier one contains, and drops none.
func TestReleasedMigrationsKeepTheirChecksums(t *testing.T) {
	t.Parallel()
	tag := previousRelease(t)
	if tag == "" {
		t.Log("there is no release before this commit")
		return
	}
	const list = "migrations/core/SHA256SUMS"
	now, err := os.ReadFile(filepath.Join(root, filepath.FromSlash(list)))
	if err != nil {
		t.Fatal(err)
	}
	then, err := git("show", tag+":"+list)
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(then) {
		if line = strings.TrimSpace(line); !strings.Contains(string(now), line+"\n") {
			t.Errorf("%s contains the migration\n%s\nwhich this commit changes: restore it, and put the change into a new one",
				tag, line)
		}
	}
}

// The processes of the version before run on the schema of this one: while a rollout replaces them, and after it was
// rolled back. In MadeUp, that version is this one, and the next one adds a column to every table.
func TestTheVersionBeforeRunsOnThisSchema(t *testing.T) {
	t.Parallel()
	t.Run("MadeUp", func(t *testing.T) {
		f := newFixture(t)
		f.exec(`DO $$
			DECLARE
				name regclass;
			BEGIN
				FOR name IN SELECT oid FROM pg_class
					WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'p') AND NOT relispartition
				LOOP
					EXECUTE format('ALTER TABLE %s ADD COLUMN of_the_next_version text NOT NULL DEFAULT ''''', name);
				END LOOP;
			END
			$$`)
		f.exec(`INSERT INTO goose_core_version (version_id, is_applied) VALUES (9999, true)`)
		f.wantWorking(binary())
	})
	if tag := previousRelease(t); tag != "" {
		t.Run(tag, func(t *testing.T) {
			f := newFixture(t)
			f.wantWorking(buildRelease(t, tag))
		})
	}
}

// buildRelease builds the program of a release and returns its path.
func buildRelease(t *testing.T, tag string) string {
	t.Helper()
	dir := t.TempDir()
	archive, path := filepath.Join(dir, "release.tar"), filepath.Join(dir, "release")
	if _, err := git("archive", "--output", archive, tag); err != nil {
		t.Fatal(err)
	}
	tree := filepath.Join(dir, "tree")
	if err := os.Mkdir(tree, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{
		{"tar", "-x", "-f", archive, "-C", tree},
		{"go", "build", "-C", tree, "-trimpath", "-buildvcs=false", "-tags", "probes", "-o", path, "./cmd/shop"},
	} {
		if output, err := exec.CommandContext(t.Context(), args[0], args[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%s: %v\n%s", strings.Join(args, " "), err, output)
		}
	}
	return path
}

// wantWorking starts the processes of a program on the fixture's servers, sends a message through all of them, and
// calls commands.
func (f *fixture) wantWorking(program string) {
	f.t.Helper()
	url := f.Config().ConnString()
	var all []*started
	for _, process := range startOrder {
		all = append(all, startProgram(f.t, program, process.name,
			"POSTGRES_URL="+testenv.As(f.t, url, process.role), "AMQP_URL="+f.amqpURL))
	}
	for _, p := range all {
		p.await(f.t)
	}
	f.exec(`INSERT INTO outbox_message (id, type, key, payload) VALUES (outbox_uuidv7(), $1, 'k', '')`, f.group.Types[0])
	testenv.Eventually(f.t, 30*time.Second, func() error {
		var taken bool
		err := f.QueryRow(f.t.Context(), `SELECT EXISTS (SELECT FROM inbox WHERE consumer = $1)`, f.group.Name).Scan(&taken)
		if err == nil && !taken {
			err = errors.New("the message has not arrived")
		}
		return err
	})
	for _, args := range []string{"outbox status", "dead list", "consumer ls", "outbox repair"} {
		if status, stdout, stderr := callProgram(f.t, program, f.environment, strings.Fields(args)...); status != 0 {
			f.t.Errorf("%s: exit status %d\n%s%s", args, status, stdout, stderr)
		}
	}
	status, stdout, stderr := callProgram(f.t, program, []string{"POSTGRES_URL=" + url}, "migrate")
	if status != 0 || stdout != "schema is up to date\n" {
		f.t.Errorf("migrate: exit status %d\n%s%s", status, stdout, stderr)
	}
}
