package architecture

import (
	"bytes"
	"fmt"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path"
	"regexp"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"
)

const maxWidth = 120 // columns; a tab counts as one

var (
	// prose matches the files with text that people wrote.
	prose = regexp.MustCompile(`(\.(go|sql|proto|sh|ya?ml|ts|mjs|css|html|md|tmpl)|/Makefile|/Dockerfile)$`)
	// wide matches the files that maxWidth applies to.
	wide = regexp.MustCompile(`\.(go|sql|proto|sh|ya?ml|ts|mjs|md|tmpl)$`)
	// unbreakable matches imports, long links and URLs, and lines of a single word.
	unbreakable = regexp.MustCompile(
		`^(import )?\s*([\w.]+ )?"\S+"$|://\S{40,}|\]\(\S{40,}\)|^\s*(//|--|#|-|\*)?\s*\S+$`)
	generated = regexp.MustCompile(`\bCode generated\b.*DO NOT EDIT|@generated`)
	// relative matches a sentence in a comment that begins with a free relative clause and is not a question.
	relative = regexp.MustCompile(`(?m)(?:^|\s)(?://|--) (?:.*[.:] )?(Whoever|Whatever|Who|What)\b[^?\n]*$`)
)

// banned lists phrases that read like a translation.
var banned = []string{
	"for ever", "be it that", "the way of a", "somebody else's", "mended", "looks after", "of one's own", "so that not",
	"whatever happens", "broken off", "breaks off", "knows of", "is told", "are told", "is said", "there is to",
}

// bannedPattern also matches a phrase that continues in the next line of a comment.
var bannedPattern = regexp.MustCompile(
	`(?i)\b(?:` + strings.ReplaceAll(strings.Join(banned, "|"), " ", `(?: |\s*\n\s*(?://|--|#|\*)?\s*)`) + `)\b`)

// TestLanguage checks the rules for texts that a program can check: the width of lines, banned phrases, how sentences
// in comments begin, and package comments.
func TestLanguage(t *testing.T) {
	t.Parallel()
	root := os.DirFS(path.Join("..", "..", ".."))
	checked := 0
	err := fs.WalkDir(root, ".", func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		hidden := strings.HasPrefix(d.Name(), ".") &&
			!slices.Contains([]string{".", ".github", ".devcontainer"}, d.Name())
		if d.IsDir() && (hidden || name == "proto/buf" || d.Name() == "node_modules" || d.Name() == "dist") {
			return fs.SkipDir // proto/buf is vendored, dist is generated
		}
		self := strings.HasSuffix(name, "architecture/language_test.go")
		if d.IsDir() || self || !prose.MatchString("/"+name) {
			return nil
		}
		text, err := fs.ReadFile(root, name)
		if err == nil && !generated.Match(text[:min(len(text), 1000)]) {
			checked++
			checkLanguage(name, text, func(line int, problem string) { t.Errorf("%s:%d: %s", name, line, problem) })
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if checked < 200 {
		t.Errorf("only %d files found", checked)
	}
}

// checkLanguage reports the problems of a file, each with its line.
func checkLanguage(name string, text []byte, report func(line int, problem string)) {
	matches := func(pattern *regexp.Regexp, problem string) {
		for _, at := range pattern.FindAllIndex(text, -1) {
			found := strings.TrimSpace(string(text[at[0]:at[1]]))
			line := 1 + bytes.Count(text[:at[1]-len(found)], []byte("\n"))
			report(line, fmt.Sprintf("%s: %q", problem, found))
		}
	}
	matches(bannedPattern, "banned phrase")
	switch path.Ext(name) {
	case ".go":
		checkPackageComment(name, text, report)
		matches(relative, "a sentence begins with a free relative clause")
	case ".sql", ".proto":
		matches(relative, "a sentence begins with a free relative clause")
	}
	markdown, code := strings.HasSuffix(strings.TrimSuffix(name, ".tmpl"), ".md"), false
	for i, line := range strings.Split(string(text), "\n") {
		if markdown && strings.HasPrefix(strings.TrimSpace(line), "```") {
			code = !code
		}
		exempt := markdown && (code || strings.HasPrefix(line, "|")) || unbreakable.MatchString(line)
		if width := utf8.RuneCountInString(line); width > maxWidth && !exempt && wide.MatchString(name) {
			report(i+1, fmt.Sprintf("the line has %d columns", width))
		}
	}
}

// checkPackageComment requires comments of the form "Package x" and "Command x".
func checkPackageComment(name string, text []byte, report func(line int, problem string)) {
	files := token.NewFileSet()
	file, err := parser.ParseFile(files, name, text, parser.PackageClauseOnly|parser.ParseComments)
	if err != nil || file.Doc == nil {
		return
	}
	want := "Package " + strings.TrimSuffix(file.Name.Name, "_test") + " "
	if file.Name.Name == "main" {
		want = "Command " + path.Base(path.Dir(name)) + " "
	}
	if !strings.HasPrefix(file.Doc.Text(), want) {
		report(files.Position(file.Doc.Pos()).Line, fmt.Sprintf("the package comment must begin with %q", want))
	}
}
