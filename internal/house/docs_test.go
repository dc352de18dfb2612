package house

import (
	"flag"
	"fmt"
	"go/ast"
	"go/token"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// page returns the text of a page of docs/.
func page(t *testing.T, name string) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("..", "..", "docs", name))
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// schema is what the migrations say, as one text.
func schema(t *testing.T) (text string) {
	t.Helper()
	found, err := filepath.Glob(filepath.Join("..", "..", "migrations", "*.sql"))
	if err != nil || len(found) == 0 {
		t.Fatalf("no migrations found: %v", err)
	}
	for _, name := range found {
		one, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		text += string(one)
	}
	return text
}

// declared returns what the packages declare: package.Name, package.Type.Method, and for tests package.TestName and package.TestName/Part, where a part is
// any string that the file holds, since it may be the key of a table as well as the name in a t.Run.
func declared(t *testing.T) map[string]bool {
	t.Helper()
	all := map[string]bool{}
	for _, f := range files(t) {
		name := path.Base(f.dir)
		var tests, parts []string
		ast.Inspect(f.syntax, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.FuncDecl:
				symbol := strings.Join(append(receiver(n), n.Name.Name), ".")
				all[name+"."+symbol] = true
				if f.test && strings.HasPrefix(symbol, "Test") {
					tests = append(tests, symbol)
				}
			case *ast.TypeSpec:
				all[name+"."+n.Name.Name] = true
			case *ast.ValueSpec:
				for _, one := range n.Names {
					all[name+"."+one.Name] = true
				}
			case *ast.BasicLit:
				if f.test && n.Kind == token.STRING {
					parts = append(parts, strings.Trim(n.Value, "\"`"))
				}
			}
			return true
		})
		for _, test := range tests {
			for _, part := range parts {
				all[name+"."+test+"/"+strings.TrimSuffix(part, "/")] = true
			}
		}
	}
	return all
}

// receiver returns the name of a method's type, or nothing for a function.
func receiver(f *ast.FuncDecl) []string {
	if f.Recv == nil {
		return nil
	}
	of := f.Recv.List[0].Type
	if pointer, ok := of.(*ast.StarExpr); ok {
		of = pointer.X
	}
	if generic, ok := of.(*ast.IndexExpr); ok {
		of = generic.X
	}
	if name, ok := of.(*ast.Ident); ok {
		return []string{name.Name}
	}
	return nil
}

var (
	quoted = regexp.MustCompile("`([^`]+)`")
	symbol = regexp.MustCompile(`^[a-z]+\.[A-Za-z]\w*(\.\w+)?(/\w+)?$`)
)

// Each promise of docs/guarantees.md names the code that keeps it and a test that breaks with it. What it names exists.
func TestGuaranteesNameWhatExists(t *testing.T) {
	t.Parallel()
	known, sql := declared(t), schema(t)
	promises := 0
	for line := range strings.Lines(page(t, "guarantees.md")) {
		cells := strings.Split(strings.Trim(strings.TrimSpace(line), "|"), " | ")
		if !strings.HasPrefix(line, "| ") || len(cells) != 4 || strings.HasPrefix(line, "| Promise ") {
			continue // a table of something else
		}
		promises++
		by, tests := quoted.FindAllStringSubmatch(cells[2], -1), quoted.FindAllStringSubmatch(cells[3], -1)
		if len(by) == 0 || len(tests) == 0 {
			t.Errorf("no code, or no test: %s", cells[0])
		}
		for _, one := range by {
			if inSQL := regexp.MustCompile(`(?i)\b` + regexp.QuoteMeta(one[1]) + `\b`); !known[one[1]] && (symbol.MatchString(one[1]) || !inSQL.MatchString(sql)) {
				t.Errorf("there is no %s: %s", one[1], cells[0])
			}
		}
		for _, one := range tests {
			if !symbol.MatchString(one[1]) || !strings.Contains(one[1], ".Test") || !known[one[1]] {
				t.Errorf("there is no test %s: %s", one[1], cells[0])
			}
		}
	}
	if promises < 30 {
		t.Errorf("only %d promises found", promises)
	}
}

var (
	link    = regexp.MustCompile(`\]\(([^)\s]+)\)`)
	heading = regexp.MustCompile(`(?m)^#+ (.+)$`)
	fenced  = regexp.MustCompile("(?ms)^```.*?^```$")
	dropped = regexp.MustCompile(`[^\p{L}\p{N}\- _]`)
)

// anchors are what a page's headings can be linked by, as GitHub makes them.
func anchors(text string) (all []string) {
	for _, one := range heading.FindAllStringSubmatch(fenced.ReplaceAllString(text, ""), -1) {
		all = append(all, strings.ReplaceAll(dropped.ReplaceAllString(strings.ToLower(one[1]), ""), " ", "-"))
	}
	return all
}

// Every link from one of our pages to another, or to a file, leads somewhere.
func TestLinksLeadSomewhere(t *testing.T) {
	t.Parallel()
	root := filepath.Join("..", "..")
	var pages []string
	for _, pattern := range []string{"*.md", "docs/*.md", "docs/adr/*.md", "proto/*.md"} {
		found, err := filepath.Glob(filepath.Join(root, pattern))
		if err != nil {
			t.Fatal(err)
		}
		pages = append(pages, found...)
	}
	links := 0
	for _, name := range pages {
		text, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		for _, found := range link.FindAllStringSubmatch(fenced.ReplaceAllString(string(text), ""), -1) {
			target, anchor, _ := strings.Cut(found[1], "#")
			if strings.Contains(target, "://") {
				continue
			}
			links++
			there := filepath.Join(filepath.Dir(name), target)
			if target == "" {
				there = name
			}
			if _, err := os.Stat(there); err != nil {
				t.Errorf("%s links to %s, which is not there", name, found[1])
				continue
			}
			if anchor == "" || filepath.Ext(there) != ".md" {
				continue
			}
			if linked, err := os.ReadFile(there); err != nil || !slices.Contains(anchors(string(linked)), anchor) {
				t.Errorf("%s links to %s, and there is no such heading", name, found[1])
			}
		}
	}
	if links < 50 {
		t.Errorf("only %d links found", links)
	}
}

// docs/README.md leads to every page.
func TestEveryPageIsInTheIndex(t *testing.T) {
	t.Parallel()
	index := page(t, "README.md")
	root := filepath.Join("..", "..", "docs")
	for _, pattern := range []string{"*.md", "adr/*.md"} {
		found, err := filepath.Glob(filepath.Join(root, pattern))
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range found {
			rel, _ := filepath.Rel(root, name)
			if rel != "README.md" && !strings.Contains(index, "]("+filepath.ToSlash(rel)+")") {
				t.Errorf("docs/README.md does not lead to %s", rel)
			}
		}
	}
}

var update = flag.Bool("update", false, "copy the numbers of docs/benchmarks.md into the pages that quote them")

// cellsOf returns the cells of a row of a table, or nothing.
func cellsOf(line string) (cells []string) {
	if !strings.HasPrefix(line, "|") {
		return nil
	}
	for _, cell := range strings.Split(strings.Trim(strings.TrimSpace(line), "|"), "|") {
		cells = append(cells, strings.TrimSpace(cell))
	}
	return cells
}

// Pages that quote a benchmark do so in tables of row, contestant, to whom it is compared, median and ratio, and quote the last run.
func TestBenchmarksAreQuotedAsTheyAre(t *testing.T) {
	t.Parallel()
	measured := map[[3]string]string{} // the row as pages quote it
	for line := range strings.Lines(page(t, "benchmarks.md")) {
		if c := cellsOf(line); len(c) == 9 { // row, contestant, unit, median, spread, ratio, spread, to, wanted
			measured[[3]string{c[0], c[1], c[7]}] = strings.ReplaceAll(fmt.Sprintf("| %s | %s | %s | %s %s | %s |\n", c[0], c[1], c[7], c[3], c[2], c[5]), "|  |", "| |")
		}
	}
	for _, name := range []string{"comparison.md", "scaling.md"} {
		var text strings.Builder
		quoted, inside := 0, false
		for line := range strings.Lines(page(t, name)) {
			c := cellsOf(line)
			inside = len(c) == 5 && (inside || c[0] == "Row")
			if inside && c[0] != "Row" && !strings.HasPrefix(c[0], "--") {
				quoted++
				found, ok := measured[[3]string{c[0], c[1], c[2]}]
				switch {
				case !ok:
					t.Errorf("docs/%s quotes what docs/benchmarks.md does not have: %s", name, line)
				case found != line && !*update:
					t.Errorf("docs/%s says\n%sand docs/benchmarks.md\n%s(go test ./internal/house -update copies it)", name, line, found)
				}
				if ok {
					line = found
				}
			}
			text.WriteString(line)
		}
		if quoted < 5 {
			t.Errorf("docs/%s: only %d numbers found", name, quoted)
		}
		if *update {
			if err := os.WriteFile(filepath.Join("..", "..", "docs", name), []byte(text.String()), 0o644); err != nil {
				t.Fatal(err)
			}
		}
	}
}
