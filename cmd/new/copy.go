package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
)

// guide is the page that explains how to fill a bare tree.
const guide = "docs/make-it-yours.md"

// templateFiles are files that no new tree gets: this program, and generated code. A new tree generates that code
// itself, because in its descriptors each name follows its length and cannot be replaced.
var templateFiles = []string{
	"cmd/new/", "internal/gen/", "web/src/gen/", "scripts/new_test.sh",
	"internal/dev/architecture/language_test.go", // other names make lines longer
}

// exampleFiles are files that belong to the example. Marks delimit parts of other files that belong to it.
var exampleFiles = []string{
	"internal/orders/", "proto/orders/", "migrations/0001_orders.sql", "cmd/demo/", "bench/", "web/test/",
	"scripts/compose_test.sh", "docs/client-examples.md", "docs/comparison.md",
	"internal/dev/architecture/example_test.go",
}

// measured is the page with numbers that were measured with the example. A bare tree keeps it unchanged.
const measured = "docs/benchmarks.md"

// omitted reports whether the new tree does not get a file of the template.
func (o *options) omitted(name string) bool {
	left := templateFiles
	if o.bare {
		left = append(left[:len(left):len(left)], exampleFiles...)
	} else {
		left = append(left[:len(left):len(left)], guide)
	}
	if slices.ContainsFunc(o.left(), func(f feature) bool { return f.isOf(name) }) {
		return true
	}
	for _, file := range left {
		if name == file || strings.HasSuffix(file, "/") && strings.HasPrefix(name, file) {
			return true
		}
	}
	return false
}

// run makes the service's folder. The tree is complete before it gets that name.
func (o *options) run(ctx context.Context, out io.Writer) (err error) {
	return o.rendered(ctx, out, func(tree string) error {
		if err := o.commit(ctx, tree, out); err != nil {
			return err
		}
		return os.Rename(tree, o.folder)
	})
}

// rendered makes the tree in a hidden folder beside the service's, calls use with it, and removes what use leaves.
func (o *options) rendered(ctx context.Context, out io.Writer, use func(tree string) error) (err error) {
	scratch, err := os.MkdirTemp(filepath.Dir(o.folder), "."+filepath.Base(o.folder)+"-")
	if err != nil {
		return err
	}
	defer func() {
		err = errors.Join(err, os.RemoveAll(scratch))
		if ctx.Err() != nil {
			err = errors.New("interrupted: nothing is left behind")
		}
	}()
	tree := filepath.Join(scratch, filepath.Base(o.folder))
	n, err := o.copyTo(ctx, tree)
	if err != nil {
		return err
	}
	fmt.Fprintf(out, "copied %d files under new names\n", n)
	if err := o.finish(ctx, tree, out); err != nil {
		return err
	}
	return use(tree)
}

// copyTo copies all tracked files in their current state.
func (o *options) copyTo(ctx context.Context, tree string) (n int, err error) {
	list, err := exec.CommandContext(ctx, "git", "-C", o.template, "ls-files", "-z").Output()
	if err != nil {
		return 0, fmt.Errorf("list the template's files: %w", err)
	}
	for name := range strings.SplitSeq(strings.TrimSuffix(string(list), "\x00"), "\x00") {
		if o.omitted(name) {
			continue
		}
		if err := o.copyOne(name, tree); errors.Is(err, fs.ErrNotExist) {
			continue // deleted but not committed
		} else if err != nil {
			return n, fmt.Errorf("copy %s: %w", name, err)
		}
		n++
	}
	return n, writeSums(tree)
}

func (o *options) copyOne(name, tree string) error {
	source := filepath.Join(o.template, filepath.FromSlash(name))
	info, err := os.Stat(source)
	if err != nil {
		return err
	}
	content, err := os.ReadFile(source)
	if err != nil {
		return err
	}
	text, err := o.rewritten(name, string(content))
	if err != nil {
		return err
	}
	name, text, err = o.renamed(name, text)
	if err != nil {
		return err
	}
	target := filepath.Join(tree, filepath.FromSlash(name))
	if err := os.MkdirAll(filepath.Dir(target), 0o755); err != nil {
		return err
	}
	return os.WriteFile(target, []byte(text), info.Mode().Perm())
}

// step is a command that runs in the new tree.
type step struct {
	what string // to report, or ""
	args []string
}

// finish generates code, records the options, and builds the tree. It installs npm's packages in the template, where
// scripts/packages.sh copies them from: so npm runs once and not for each service.
func (o *options) finish(ctx context.Context, tree string, out io.Writer) error {
	if err := o.recordIn(ctx, tree); err != nil {
		return err
	}
	packages := []step{{"", []string{"bash", "scripts/packages.sh", "tools", "web"}}}
	if err := o.inTree(ctx, o.template, out, packages); err != nil {
		return err
	}
	return o.inTree(ctx, tree, out, []step{
		{"generating code", []string{"make", "-s", "generate"}},
		{"tidying go.mod", []string{"go", "mod", "tidy"}},
		{"", o.benchTidied()},
		{"", []string{"go", "-C", "conformance", "mod", "tidy"}},
		{"building", []string{"go", "build", "./..."}},
		{"", o.settingsListed()},
		{"", o.consoleBuilt()},
	})
}

// commit makes a repository of the tree. The branch of the template has the tree as the template makes it, and main
// begins there.
func (o *options) commit(ctx context.Context, tree string, out io.Writer) error {
	message := "Make " + o.service + " from the template\n\nIt was at " + o.version(ctx) + "."
	return o.inTree(ctx, tree, out, []step{
		{"committing", []string{"git", "init", "-q", "-b", templateBranch}},
		{"", []string{"git", "add", "-A"}},
		{"", append(o.identity(ctx), "commit", "-q", "--no-verify", "-m", message)},
		{"", []string{"git", "switch", "-q", "-c", "main"}},
	})
}

func (o *options) inTree(ctx context.Context, tree string, out io.Writer, steps []step) error {
	for _, step := range steps {
		if step.what != "" {
			fmt.Fprintln(out, step.what)
		}
		command := exec.CommandContext(ctx, step.args[0], step.args[1:]...)
		command.Dir = tree
		command.Env = append(os.Environ(), "PACKAGES_FROM="+o.template)
		// On SIGTERM, make stops its children, so npm ends before its folder is removed.
		command.Cancel = func() error { return command.Process.Signal(syscall.SIGTERM) }
		if output, err := command.CombinedOutput(); err != nil {
			return fmt.Errorf("%s: %w\n%s", strings.Join(step.args, " "), err, output)
		}
	}
	return nil
}

// benchTidied returns the command that tidies the module of the benchmarks, which belongs to the example.
func (o *options) benchTidied() []string {
	if o.bare {
		return []string{"true"}
	}
	return []string{"go", "-C", "bench", "mod", "tidy"}
}

// settingsListed returns the command that lists the settings of a service without some features or the example.
func (o *options) settingsListed() []string {
	if !o.bare {
		return []string{"true"}
	}
	return []string{"go", "test", "-count=1", "-run", "^TestConfigurationPage$", "./cmd/" + o.service, "-update"}
}

// consoleBuilt returns the command that builds the console without a page.
func (o *options) consoleBuilt() []string {
	if o.has("durable-calls") || !o.has("console") {
		return []string{"true"}
	}
	return []string{"make", "-s", "console"}
}

// identity returns the git command, with a user name if git has none configured.
func (o *options) identity(ctx context.Context) []string {
	git := []string{"git", "-c", "commit.gpgsign=false"}
	if exec.CommandContext(ctx, "git", "-C", o.template, "var", "GIT_COMMITTER_IDENT").Run() != nil {
		git = append(git, "-c", "user.name="+o.service, "-c", "user.email="+o.service+"@localhost")
	}
	return git
}

// version names the copied state of the template.
func (o *options) version(ctx context.Context) string {
	text, err := exec.CommandContext(ctx, "git", "-C", o.template, "describe", "--tags", "--always", "--dirty").Output()
	if err != nil {
		return "no commit"
	}
	return strings.TrimSpace(string(text))
}
