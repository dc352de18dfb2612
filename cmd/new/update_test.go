package main

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// updatable is a small service as if cmd/new had made it. Tests render trees by hand, since the real rendering takes
// minutes; TestMadeAndUpdated runs that.
type updatable struct {
	*testing.T
	options options
}

func newUpdatable(t *testing.T) *updatable {
	t.Helper()
	dir := t.TempDir()
	u := &updatable{t, options{
		module: "github.com/acme/billing", service: "billing", folder: filepath.Join(dir, "billing"), template: "../..",
	}}
	u.write(u.options.folder, map[string]string{
		"core.go": "1\n2\n3\n4\n5\n", "gone.go": "gone\n", ".gitignore": "*.log\n",
	})
	if err := u.options.recordIn(t.Context(), u.options.folder); err != nil {
		t.Fatal(err)
	}
	if err := u.options.commit(t.Context(), u.options.folder, &bytes.Buffer{}); err != nil {
		t.Fatal(err)
	}
	return u
}

func (u *updatable) write(dir string, files map[string]string) {
	u.Helper()
	for name, text := range files {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			u.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			u.Fatal(err)
		}
	}
}

// change commits files of the service's owner.
func (u *updatable) change(files map[string]string) {
	u.Helper()
	u.write(u.options.folder, files)
	u.git("add", "-A")
	u.git("-c", "user.name=u", "-c", "user.email=u@localhost", "commit", "-q", "-m", "change")
}

func (u *updatable) git(args ...string) string {
	u.Helper()
	output, err := u.options.git(u.Context(), args...)
	if err != nil {
		u.Fatal(err)
	}
	return output
}

// update updates the service to a template that renders these files.
func (u *updatable) update(dryRun bool, files map[string]string) (output string, err error) {
	u.Helper()
	o := &options{folder: u.options.folder, updates: true, dryRun: dryRun}
	if err := o.findService(u.Context()); err != nil {
		return "", err
	}
	tree := filepath.Join(u.TempDir(), "billing")
	u.write(tree, files)
	u.write(tree, map[string]string{"ignored.log": ""})
	if err := o.recordIn(u.Context(), tree); err != nil {
		u.Fatal(err)
	}
	var out bytes.Buffer
	err = o.updateTo(u.Context(), tree, &out)
	return out.String(), err
}

func (u *updatable) want(name, want string) {
	u.Helper()
	got, err := os.ReadFile(filepath.Join(u.options.folder, name))
	if string(got) != want || want == "" && err == nil {
		u.Errorf("%s: got %q, %v, want %q", name, got, err, want)
	}
}

var newer = map[string]string{"core.go": "1\n2\n3\n4\nfive\n", "added.go": "added\n", ".gitignore": "*.log\n"}

func TestUpdate(t *testing.T) {
	t.Parallel()
	u := newUpdatable(t)
	u.change(map[string]string{"core.go": "one\n2\n3\n4\n5\n", "own.go": "own\n"})
	before := u.git("rev-parse", "HEAD", templateBranch)
	output, err := u.update(true, newer)
	if err != nil || !strings.Contains(output, "added.go") || !strings.Contains(output, "has no conflicts") {
		t.Errorf("dry run: %s, %v", output, err)
	}
	if after := u.git("rev-parse", "HEAD", templateBranch); after != before || u.git("status", "--porcelain") != "" {
		t.Error("the dry run changed something")
	}
	if output, err := u.update(false, newer); err != nil {
		t.Fatal(output, err)
	}
	u.want("core.go", "one\n2\n3\n4\nfive\n")
	u.want("added.go", "added\n")
	u.want("gone.go", "")
	u.want("own.go", "own\n")
	u.want("ignored.log", "")
	if output, err := u.update(false, newer); err != nil || !strings.Contains(output, "is up to date") {
		t.Errorf("again: %s, %v", output, err)
	}
	third := map[string]string{"core.go": "1\n2\n3\n4\nfive\n", "added.go": "changed\n", ".gitignore": "*.log\n"}
	if output, err := u.update(false, third); err != nil {
		t.Fatal(output, err)
	}
	u.want("added.go", "changed\n")
	u.want("core.go", "one\n2\n3\n4\nfive\n")
	if status := u.git("status", "--porcelain"); status != "" {
		t.Errorf("left behind: %s", status)
	}
}

// Only files that both sides edited conflict. git can resolve or undo the merge.
func TestUpdateLeavesConflictsToGit(t *testing.T) {
	t.Parallel()
	u := newUpdatable(t)
	u.change(map[string]string{"core.go": "1\n2\n3\n4\ncinq\n", "own.go": "own\n"})
	if output, err := u.update(true, newer); err != nil || !strings.Contains(output, "conflicts in:\n  core.go\n") {
		t.Errorf("dry run: %s, %v", output, err)
	}
	output, err := u.update(false, newer)
	if err == nil || !strings.Contains(err.Error(), "1 files were edited") || !strings.Contains(output, "core.go") {
		t.Errorf("%s, %v", output, err)
	}
	u.want("added.go", "added\n")
	if _, err := u.update(false, newer); err == nil || !strings.Contains(err.Error(), "commit or stash them first") {
		t.Errorf("in the middle of a merge: %v", err)
	}
	u.change(map[string]string{"core.go": "1\n2\n3\n4\nboth\n"})
	if output, err := u.update(false, newer); err != nil || !strings.Contains(output, "is up to date") {
		t.Errorf("after the resolution: %s, %v", output, err)
	}
}

// A fresh clone has the branch of the template only as a remote branch. Without it nothing can be merged.
func TestUpdateFindsTheBranch(t *testing.T) {
	t.Parallel()
	u := newUpdatable(t)
	clone := filepath.Join(t.TempDir(), "billing")
	u.git("clone", "-q", u.options.folder, clone)
	origin := u.options.folder
	u.options.folder = clone
	if output, err := u.update(false, newer); err != nil {
		t.Errorf("%s, %v", output, err)
	}
	u.want("added.go", "added\n")
	u.options.folder = origin
	u.git("branch", "-D", templateBranch)
	if _, err := u.update(false, newer); err == nil || !strings.Contains(err.Error(), "has no branch template") {
		t.Errorf("without the branch: %v", err)
	}
	u.options.folder = t.TempDir()
	if _, err := u.update(false, newer); err == nil || !strings.Contains(err.Error(), "no git repository") {
		t.Errorf("without a repository: %v", err)
	}
}

func TestDuties(t *testing.T) {
	t.Parallel()
	const changelog = "# Changelog\n\n## Unreleased\n\n### Added\n\n- a\n\n### Owners must\n\n- do this\n\n" +
		"## 0.2.0 (2026-01-01)\n\n### Owners must\n\n- do that\n\n### Fixed\n\n- b\n\n## 0.1.0\n\n### Owners must\n\n- know\n"
	for after, want := range map[string]string{
		"v0.1.0": "Unreleased:\n- do this|0.2.0:\n- do that", "v0.2.0": "Unreleased:\n- do this",
		"v0.1.0-3-gabc": "Unreleased:\n- do this|0.2.0:\n- do that",
	} {
		if got := strings.Join(duties(changelog, after), "|"); got != want {
			t.Errorf("after %s: %q, want %q", after, got, want)
		}
	}
}

func TestWrongUpdates(t *testing.T) {
	t.Parallel()
	for args, want := range map[string]string{
		"-update DIR -bare": "the service has its options",
		"-update DIR more":  "the service has its options",
		"-dry-run -module a.b/c -service billing DIR/x": "-dry-run needs -update",
		"-update DIR/none": "is no git repository",
	} {
		dir := t.TempDir()
		status, stderr := call(t, ".", strings.Fields(strings.ReplaceAll(args, "DIR", dir))...)
		if status != 2 || strings.Count(stderr, "\n") != 1 || !strings.Contains(stderr, want) {
			t.Errorf("%s: exit status %d, %q", args, status, stderr)
		}
		wantEmpty(t, dir)
	}
}
