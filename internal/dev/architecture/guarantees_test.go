package architecture

import (
	"go/ast"
	"go/token"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// schema is what the migrations say, as one text.
func schema(t *testing.T) (text string) {
	t.Helper()
	found, err := filepath.Glob(filepath.Join("..", "..", "..", "migrations", "*.sql"))
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
			_, noFile := os.Stat(filepath.Join("..", "..", "..", filepath.FromSlash(one[1])))
			inSQL := regexp.MustCompile(`(?i)\b` + regexp.QuoteMeta(one[1]) + `\b`)
			if !known[one[1]] && noFile != nil && (symbol.MatchString(one[1]) || !inSQL.MatchString(sql)) {
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
