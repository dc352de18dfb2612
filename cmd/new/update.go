package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

const (
	// templateBranch is the branch of a service that has only what the template made, commit by commit.
	templateBranch = "template"
	// recordFile is the file on that branch with the record.
	recordFile = ".template.json"
)

// record is what a service knows about its template.
type record struct {
	Version string   `json:"version"` // of the template: a tag, or a commit
	Module  string   `json:"module"`
	Service string   `json:"service"`
	Bare    bool     `json:"bare"`
	Without []string `json:"without,omitempty"`
}

func (o *options) recordIn(ctx context.Context, tree string) error {
	r := record{o.version(ctx), o.module, o.service, o.bare, o.without}
	text, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(tree, recordFile), append(text, '\n'), 0o644)
}

// git runs git in the service's folder and returns its trimmed output.
func (o *options) git(ctx context.Context, args ...string) (string, error) {
	var failure bytes.Buffer
	command := exec.CommandContext(ctx, "git", append([]string{"-C", o.folder}, args...)...)
	command.Stderr = &failure
	output, err := command.Output()
	if err != nil {
		err = fmt.Errorf("git %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(failure.String()))
	}
	return strings.TrimSpace(string(output)), err
}

// findService reads the options of the service to update, and checks that git can merge into it.
func (o *options) findService(ctx context.Context) error {
	top, err := o.git(ctx, "rev-parse", "--show-toplevel")
	if err != nil {
		return fmt.Errorf("-update: %s is no git repository", o.folder)
	}
	o.folder = top
	branch, err := o.git(ctx, "rev-parse", "-q", "--verify", "refs/heads/"+templateBranch)
	if err != nil { // a fresh clone has it only as a remote branch
		if branch, err = o.git(ctx, "rev-parse", "-q", "--verify", "refs/remotes/origin/"+templateBranch); err != nil {
			return fmt.Errorf("-update: %s has no branch %s: cmd/new made it together with the service; push it along with "+
				"main, and fetch it", o.folder, templateBranch)
		}
		if _, err := o.git(ctx, "branch", templateBranch, branch); err != nil {
			return err
		}
	}
	o.base = branch
	text, err := o.git(ctx, "show", branch+":"+recordFile)
	if err != nil {
		return fmt.Errorf("-update: the branch %s has no %s", templateBranch, recordFile)
	}
	if err := json.Unmarshal([]byte(text), &o.old); err != nil {
		return fmt.Errorf("-update: %s: %w", recordFile, err)
	}
	o.module, o.service, o.bare, o.without = o.old.Module, o.old.Service, o.old.Bare, o.old.Without
	if changed, err := o.git(ctx, "status", "--porcelain"); err != nil || changed != "" {
		return errors.Join(fmt.Errorf("-update: %s has changes: commit or stash them first", o.folder), err)
	}
	return o.findTemplate()
}

// update renders the template with the service's options onto the branch of the template, and merges that branch.
func (o *options) update(ctx context.Context, out io.Writer) error {
	return o.rendered(ctx, out, func(tree string) error { return o.updateTo(ctx, tree, out) })
}

func (o *options) updateTo(ctx context.Context, tree string, out io.Writer) error {
	commit, err := o.commitOnto(ctx, tree)
	if err != nil {
		return err
	}
	if o.dryRun && commit != o.base {
		return o.preview(ctx, commit, out)
	}
	if commit != o.base {
		if _, err := o.git(ctx, "update-ref", "refs/heads/"+templateBranch, commit, o.base); err != nil {
			return err
		}
	}
	if _, err := o.git(ctx, "merge-base", "--is-ancestor", commit, "HEAD"); err == nil {
		fmt.Fprintf(out, "%s is up to date with %s\n", o.folder, o.version(ctx))
		return nil
	}
	return o.merge(ctx, out)
}

// commitOnto commits the tree on top of the branch of the template, without a change to the branch or the service's
// folder, and returns the commit. It returns the branch's own commit if nothing but the version differs.
func (o *options) commitOnto(ctx context.Context, tree string) (commit string, err error) {
	folder, err := o.git(ctx, "rev-parse", "--absolute-git-dir")
	if err != nil {
		return "", err
	}
	inTree := append(os.Environ(),
		"GIT_DIR="+folder, "GIT_WORK_TREE="+tree, "GIT_INDEX_FILE="+filepath.Join(filepath.Dir(tree), "index"))
	run := func(args ...string) (string, error) {
		command := exec.CommandContext(ctx, args[0], args[1:]...)
		command.Dir, command.Env = tree, inTree
		output, err := command.CombinedOutput()
		if err != nil {
			err = fmt.Errorf("%s: %w: %s", strings.Join(args, " "), err, output)
		}
		return strings.TrimSpace(string(output)), err
	}
	if _, err = run("git", "add", "-A"); err != nil {
		return "", err
	}
	written, err := run("git", "write-tree")
	if err != nil {
		return "", err
	}
	changed, err := run("git", "diff", "--name-only", o.base, written)
	if err != nil || changed == "" || changed == recordFile {
		return o.base, err
	}
	message := "Update the template to " + o.version(ctx)
	return run(append(o.identity(ctx), "commit-tree", written, "-p", o.base, "-m", message)...)
}

// preview prints what an update would change, and which files would conflict.
func (o *options) preview(ctx context.Context, commit string, out io.Writer) error {
	changes, err := o.git(ctx, "diff", "--stat", o.base, commit)
	if err != nil {
		return err
	}
	fmt.Fprintf(out, "from %s to %s:\n %s\n", o.old.Version, o.version(ctx), changes)
	// Exits with 1 and lists the files if there are conflicts.
	merged, err := o.git(ctx, "merge-tree", "--write-tree", "--name-only", "--no-messages", "HEAD", commit)
	if err == nil {
		fmt.Fprintln(out, "the merge has no conflicts")
		return nil
	}
	if lines := strings.Split(merged, "\n"); len(lines) > 1 {
		fmt.Fprintf(out, "conflicts in:\n  %s\n", strings.Join(lines[1:], "\n  "))
		return nil
	}
	return err
}

// merge merges the branch of the template into the service's current branch. Conflicts are left to git.
func (o *options) merge(ctx context.Context, out io.Writer) error {
	identity := o.identity(ctx)[1:] // without the word git
	_, err := o.git(ctx, append(identity, "merge", "-q", "--no-edit", templateBranch)...)
	if err == nil {
		return o.reportUpdate(out)
	}
	conflicts, listErr := o.git(ctx, "diff", "--name-only", "--diff-filter=U")
	if listErr != nil || conflicts == "" {
		return errors.Join(err, listErr)
	}
	fmt.Fprintf(out, "%s\n", conflicts)
	return fmt.Errorf("%d files were edited here and in the template: resolve the conflicts and run `git commit`, "+
		"or undo the merge with `git merge --abort`", len(strings.Split(conflicts, "\n")))
}

// duties returns what the template's changelog tells owners to do for each version after the given one, newest first.
func duties(changelog, after string) (list []string) {
	for section := range strings.SplitSeq(changelog, "\n## ") {
		title, body, _ := strings.Cut(section, "\n")
		version, _, _ := strings.Cut(strings.Trim(title, "# "), " ")
		// git describe appends to a tag how many commits follow it.
		if released, _, _ := strings.Cut(strings.TrimPrefix(after, "v"), "-"); released == version {
			break
		}
		if _, owners, found := strings.Cut(body, "\n### Owners must\n"); found {
			owners, _, _ = strings.Cut(owners, "\n### ")
			list = append(list, version+":\n"+strings.TrimSpace(owners))
		}
	}
	return list
}

// reportUpdate prints what remains to be done after an update.
func (o *options) reportUpdate(out io.Writer) error {
	text, err := os.ReadFile(filepath.Join(o.template, "CHANGELOG.md"))
	if err != nil {
		return err
	}
	if list := duties(string(text), o.old.Version); len(list) > 0 {
		fmt.Fprintf(out, "\nWhat you must do besides:\n\n%s\n", strings.Join(list, "\n\n"))
	}
	fmt.Fprintf(out, "\nNext:\n\n  cd %s\n  make lint test\n  git push origin HEAD %s\n", o.folder, templateBranch)
	return nil
}
