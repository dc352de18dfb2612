package main

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
)

func TestMain(m *testing.M) {
	status := m.Run()
	if scratch != "" {
		_ = os.RemoveAll(scratch)
	}
	os.Exit(status)
}

var scratch string

// binary builds the program under test once.
var binary = sync.OnceValue(func() string {
	var err error
	if scratch, err = os.MkdirTemp("", "new-"); err != nil {
		panic(err)
	}
	path := filepath.Join(scratch, "new")
	if output, err := exec.Command("go", "build", "-o", path, ".").CombinedOutput(); err != nil {
		panic(string(output))
	}
	return path
})

// call runs the program in a folder.
func call(t *testing.T, dir string, args ...string) (status int, stderr string) {
	t.Helper()
	command := exec.CommandContext(t.Context(), binary(), args...)
	command.Dir = dir
	var out bytes.Buffer
	command.Stderr = &out
	if err := command.Run(); err != nil && !errors.As(err, new(*exec.ExitError)) {
		t.Fatal(err)
	}
	return command.ProcessState.ExitCode(), out.String()
}

func wantEmpty(t *testing.T, dir string) {
	t.Helper()
	left, err := os.ReadDir(dir)
	if err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

func TestWrongArguments(t *testing.T) {
	t.Parallel()
	full := t.TempDir()
	if err := os.WriteFile(filepath.Join(full, "file"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for name, test := range map[string]struct{ args, want string }{
		"nothing":               {"", "usage: "},
		"no module":             {"-service billing DIR/billing", "usage: "},
		"no service":            {"-module github.com/acme/billing DIR/billing", "usage: "},
		"no folder":             {"-module github.com/acme/billing -service billing", "usage: "},
		"two folders":           {"-module github.com/acme/billing -service billing DIR/billing DIR/more", "usage: "},
		"flag after the folder": {"-module github.com/acme/billing -service billing DIR/billing -bare", "usage: "},
		"unknown flag": {"-modul github.com/acme/billing -service billing DIR/billing",
			"not defined: -modul"},
		"without a feature of the example": {"-without console -module github.com/acme/billing -service billing DIR/billing",
			"-without needs -bare"},
		"without an unknown feature": {"-bare -without web -module github.com/acme/billing -service billing DIR/billing",
			`"web" is none of console, durable-calls, rpc-over-rabbitmq`},
		"both forms": {"-bare -example -module github.com/acme/billing -service billing DIR/billing",
			"exclude each other"},
		"module with spaces": {"-module github.com/acme/bil+,ling -service billing DIR/billing",
			"-module: malformed"},
		"module without a dot": {"-module billing -service billing DIR/billing", "-module: malformed"},
		"module with a version": {"-module github.com/acme/billing@v1 -service billing DIR/billing",
			"-module: malformed"},
		"capitals": {"-module github.com/acme/billing -service Billing DIR/billing",
			`"Billing" must be 2 to 30 lower-case`},
		"a hyphen": {"-module github.com/acme/billing -service my-billing DIR/billing",
			"must be 2 to 30 lower-case"},
		"a digit first": {"-module github.com/acme/billing -service 2pay DIR/billing",
			"must be 2 to 30 lower-case"},
		"a path": {"-module github.com/acme/billing -service ../x DIR/billing",
			"must be 2 to 30 lower-case"},
		"a Go keyword": {"-module github.com/acme/billing -service func DIR/billing",
			`"func" is a Go keyword`},
		"an SQL keyword": {"-module github.com/acme/billing -service user DIR/billing",
			`"user" is an SQL keyword`},
		"a package of the template": {"-module github.com/acme/billing -service outbox DIR/billing",
			`"outbox" is internal/outbox of the template`},
		"a command of the template": {"-module github.com/acme/billing -service stack DIR/billing",
			`"stack" is cmd/stack of the template`},
		"a folder of Go": {"-module github.com/acme/billing -service internal DIR/billing",
			`"internal" is a folder`},
		"a common first try":   {"-module github.com/acme/billing -service test DIR/billing", `"test" is `},
		"a folder that exists": {"-module github.com/acme/billing -service billing FULL", "already exists"},
		"a file that exists":   {"-module github.com/acme/billing -service billing FULL/file", "already exists"},
		"in no folder": {"-module github.com/acme/billing -service billing DIR/none/billing",
			"parent folder does not exist"},
		"in a file": {"-module github.com/acme/billing -service billing FULL/file/billing",
			"is not a folder"},
		"in the template": {"-module github.com/acme/billing -service billing ../billing",
			"is inside the template"},
		"in the template, hidden": {"-module github.com/acme/billing -service billing ../../.github/billing",
			"is inside the template"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			replacer := strings.NewReplacer("DIR", dir, "FULL", full)
			status, stderr := call(t, ".", strings.Fields(replacer.Replace(test.args))...)
			if status != 2 || strings.Count(stderr, "\n") != 1 || !strings.HasPrefix(stderr, "new: ") ||
				!strings.Contains(stderr, test.want) {
				t.Errorf("exit status %d, %q, want %q", status, stderr, test.want)
			}
			wantEmpty(t, dir)
		})
	}
}

func TestNeedsACheckout(t *testing.T) {
	t.Parallel()
	outside, dir := t.TempDir(), t.TempDir()
	status, stderr := call(t, outside, "-module", "github.com/acme/billing", "-service", "billing",
		filepath.Join(dir, "billing"))
	const want = "new: this is not a git checkout of the template: clone the template, and call this program there\n"
	if status != 2 || stderr != want {
		t.Errorf("exit status %d, %q", status, stderr)
	}
	wantEmpty(t, dir)
}

// Ctrl-C in the middle removes what was copied.
func TestInterruptLeavesNothingBehind(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	command := exec.CommandContext(t.Context(), binary(), "-module", "github.com/acme/billing", "-service", "billing",
		filepath.Join(dir, "billing"))
	var stderr bytes.Buffer
	command.Stderr = &stderr
	stdout, err := command.StdoutPipe()
	if err == nil {
		err = command.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	output := make([]byte, len("copied"))
	if _, err := stdout.Read(output); err != nil {
		t.Error(err)
	}
	if err := command.Process.Signal(syscall.SIGINT); err != nil {
		t.Error(err)
	}
	_, _ = bytes.NewBuffer(nil).ReadFrom(stdout)
	_ = command.Wait()
	if command.ProcessState.ExitCode() != 1 || stderr.String() != "new: interrupted: nothing is left behind\n" {
		t.Errorf("%s, %q", command.ProcessState, &stderr)
	}
	wantEmpty(t, dir)
}

// optionsOf parses a command line.
func optionsOf(t *testing.T, form, service, folder string) *options {
	t.Helper()
	o, err := parse(append(strings.Fields(form), "-module", "github.com/acme/billing", "-service", service, folder))
	if err != nil {
		t.Fatal(err)
	}
	return o
}

// exempt matches lines that use the word orders, or name a tool of the template, in a sense that is not the example's.
var exempt = regexp.MustCompile(`Key orders|key orders|opposite orders|two orders differ|different orders|` +
	`DROP TABLE orders|relation orders`)

// A bare tree mentions neither the template's service nor its example nor what was omitted.
func TestBareTreeDoesNotNameTheExample(t *testing.T) {
	t.Parallel()
	named := regexp.MustCompile(`(?i)shop|\borders\b|\bordersv1|PlaceOrder|OrderService|OrderPlaced|SetStock|` +
		`cmd/demo|make demo|make bench|compose_test|fulfillment|the example.s\b|group=?\W+notifications`)
	everyText(t, copied(t, "-bare", "billing"), func(name, line string) {
		if name != measured && named.MatchString(line) && !exempt.MatchString(line) {
			t.Errorf("%s: %s", name, line)
		}
	})
}

const withoutAll = "-bare -without console,durable-calls,rpc-over-rabbitmq"

// featuresNamed are words for the features, and exempted lines have another sense of them.
var (
	featuresNamed = regexp.MustCompile(`(?i)durable.?call|\bconsole\b|operations\.v1|internal/operations|rabbitrpc|` +
		`over.?rabbitmq|CALL_(KEYS|CON|LIM)|\brpc-(server|client)\b|OpsService`)
	exempted = regexp.MustCompile(`https?://(evil\.)?console\.example|const console|closed, console|console \+|` +
		`console: true|{open, console|\[\]string{console}`)
)

// A tree without the features does not mention them, except in records of past decisions.
func TestTreeWithoutFeaturesDoesNotNameThem(t *testing.T) {
	t.Parallel()
	everyText(t, copied(t, withoutAll, "billing"), func(name, line string) {
		later := name == "docs/configuration.md" // finish writes it again
		past := name == measured || strings.HasPrefix(name, "docs/adr/")
		if !later && !past && featuresNamed.MatchString(line) && !exempted.MatchString(line) {
			t.Errorf("%s: %s", name, line)
		}
	})
}

// The guide says how many lines each feature brings, within a tenth. Generated code and built pages do not count.
func TestTheGuideCountsTheLinesOfFeatures(t *testing.T) {
	t.Parallel()
	page, err := os.ReadFile(filepath.Join("..", "..", guide))
	if err != nil {
		t.Fatal(err)
	}
	lines := func(form string) (n int) {
		everyText(t, copied(t, form, "billing"), func(name, _ string) {
			if !strings.Contains(name, "/dist/") && name != "docs/configuration.md" && filepath.Ext(name) != ".png" {
				n++
			}
		})
		return n
	}
	all := lines("-bare")
	for _, f := range features {
		want := all - lines("-bare -without "+f.name)
		row := regexp.MustCompile("(?m)^\\| `" + f.name + "` \\|.*\\| ([0-9,]+) \\|$").FindSubmatch(page)
		if row == nil {
			t.Errorf("%s has no row for %s, which brings %d lines", guide, f.name, want)
			continue
		}
		got, err := strconv.Atoi(strings.ReplaceAll(string(row[1]), ",", ""))
		if err != nil || got < want*9/10 || got > want*11/10 {
			t.Errorf("%s says %s lines of %s, but it brings %d (%v)", guide, row[1], f.name, want, err)
		}
	}
}

// Each pattern has a file, and features are taken out of Go without marks.
func TestFeaturesAreWholeFiles(t *testing.T) {
	t.Parallel()
	list, err := exec.Command("git", "-C", "../..", "ls-files").Output()
	if err != nil {
		t.Fatal(err)
	}
	names := strings.Fields(string(list))
	for _, f := range features {
		for _, pattern := range f.files {
			one := feature{files: []string{pattern}}
			if !slices.ContainsFunc(names, one.isOf) {
				t.Errorf("%s: no file matches %s", f.name, pattern)
			}
		}
	}
	everyText(t, filepath.Join("..", ".."), func(name, line string) {
		if filepath.Ext(name) == ".go" && mark.MatchString(line) {
			t.Errorf("%s: %s", name, line)
		}
	})
}

// With the example, the domain keeps its name and the service gets its new one.
func TestNameOfTheServiceIsRenamedEverywhere(t *testing.T) {
	t.Parallel()
	tree := copied(t, "-example", "billing")
	everyText(t, tree, func(name, line string) {
		named := strings.Contains(line, "cmd/new") && name != "docs/upgrading.md" // tells owners how to update
		if named || strings.Contains(strings.ToLower(line), "shop") || strings.Contains(line, "new-test") {
			t.Errorf("%s: %s", name, line)
		}
	})
	for _, name := range []string{"internal/orders/orders.go", "proto/orders/v1/orders.proto",
		"proto/billing/operations/v1/operations.proto", "cmd/billing/main.go"} {
		if _, err := os.Stat(filepath.Join(tree, filepath.FromSlash(name))); err != nil {
			t.Error(err)
		}
	}
}

// The service's name has no other meaning and is not part of another word. Otherwise it could not be replaced.
func TestTheServicesNameStandsAlone(t *testing.T) {
	t.Parallel()
	part := regexp.MustCompile(`(?i:[a-z]shop|shop[a-z])|Shop`)
	everyText(t, copied(t, "-example", templateService), func(name, line string) {
		if part.MatchString(line) {
			t.Errorf("%s: %s", name, line)
		}
	})
}

// The core's migrations get the service's name and no other change, even if the name is a word of their text. The list
// of their checksums is that of the new files.
func TestCoreMigrationsChangeOnlyTheServicesName(t *testing.T) {
	t.Parallel()
	for form, service := range map[string]string{"-bare": "key", "-example": "billing"} {
		tree := copied(t, form, service)
		files, err := filepath.Glob(filepath.Join("..", "..", filepath.FromSlash(coreMigrations), "*.sql"))
		if err != nil || len(files) == 0 {
			t.Fatalf("%v, %v", files, err)
		}
		var sums strings.Builder
		for _, file := range files {
			text, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			want := strings.ReplaceAll(string(text), templateService, service)
			got := readIn(t, tree, coreMigrations+filepath.Base(file))
			if got != want {
				t.Errorf("%s: %s has other changes", form, file)
			}
			fmt.Fprintf(&sums, "%x  %s\n", sha256.Sum256([]byte(got)), filepath.Base(file))
		}
		if got := readIn(t, tree, coreMigrations+"SHA256SUMS"); got != sums.String() {
			t.Errorf("%s: the list of checksums is\n%swant\n%s", form, got, sums.String())
		}
	}
}

// readIn returns the text of a file in a tree.
func readIn(t *testing.T, tree, name string) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(tree, filepath.FromSlash(name)))
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// Marks are removed, and links lead to existing files.
func TestPagesOfANewTreeLeadSomewhere(t *testing.T) {
	t.Parallel()
	for _, form := range []string{"-bare", "-example", withoutAll} {
		tree := copied(t, form, "billing")
		link := regexp.MustCompile(`\]\(([^)#:]+)(?:#[^)]*)?\)`)
		everyText(t, tree, func(name, line string) {
			if len(line) < 100 && mark.MatchString(line) {
				t.Errorf("%s %s: mark %q", form, name, line)
			}
			if filepath.Ext(name) != ".md" {
				return
			}
			for _, found := range link.FindAllStringSubmatch(line, -1) {
				if _, err := os.Stat(filepath.Join(tree, filepath.Dir(name), found[1])); err != nil {
					t.Errorf("%s %s leads nowhere: %s", form, name, found[1])
				}
			}
		})
	}
}

func TestMarks(t *testing.T) {
	t.Parallel()
	const text = "a\n  # example\nb\n  # /example\n<!-- template -->\nc\n<!-- /template -->\n" +
		"// example of something\nd\n"
	for bare, want := range map[bool]string{
		true:  "a\n// example of something\nd\n",
		false: "a\nb\n// example of something\nd\n",
	} {
		if got, err := (&options{bare: bare}).unmarked(text); err != nil || got != want {
			t.Errorf("bare %v: %q, %v", bare, got, err)
		}
	}
	for _, wrong := range []string{
		"# example\n", "# /example\n", "# example\n# template\n", "# example\n# /template\n",
	} {
		if got, err := new(options).unmarked(wrong); err == nil {
			t.Errorf("%q became %q", wrong, got)
		}
	}
}

// copied makes a tree of renamed files without generated code, and returns its folder.
func copied(t *testing.T, form, service string) string {
	t.Helper()
	o := optionsOf(t, form, service, filepath.Join(t.TempDir(), "billing"))
	if n, err := o.copyTo(t.Context(), o.folder); err != nil || n < 200 {
		t.Fatalf("%d files copied, %v", n, err)
	}
	return o.folder
}

// everyText calls fn with each line of the tree, except in verbatim files.
func everyText(t *testing.T, tree string, fn func(name, line string)) {
	t.Helper()
	err := filepath.WalkDir(tree, func(path string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		name, err := filepath.Rel(tree, path)
		if err != nil || verbatim(filepath.ToSlash(name)) {
			return err
		}
		text, err := os.ReadFile(path)
		for line := range strings.Lines(string(text)) {
			fn(filepath.ToSlash(name), strings.TrimSuffix(line, "\n"))
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}
