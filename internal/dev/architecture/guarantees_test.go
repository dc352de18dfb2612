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

// schema returns the text of all migrations.
func schema(t *testing.T) (text string) {
	t.Helper()
	for _, name := range migrationFiles(t) {
		migration, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		text += string(migration)
	}
	return text
}

// migrationFiles returns the paths of the migrations of both sets.
func migrationFiles(t *testing.T) (found []string) {
	t.Helper()
	for _, folder := range []string{"core", "."} {
		files, err := filepath.Glob(filepath.Join("..", "..", "..", "migrations", folder, "*.sql"))
		if err != nil || folder == "core" && len(files) == 0 {
			t.Fatalf("no migrations found: %v", err)
		}
		found = append(found, files...)
	}
	return found
}

// declared returns the declarations of the packages: package.Name, package.Type.Method, and for tests package.TestName
// and package.TestName/Part. A part is any string in the file, because it may be the key of a table as well as the
// name in a t.Run.
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
				for _, value := range n.Names {
					all[name+"."+value.Name] = true
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

// receiver returns the name of a method's type, or nil for a function.
func receiver(f *ast.FuncDecl) []string {
	if f.Recv == nil {
		return nil
	}
	expr := f.Recv.List[0].Type
	if pointer, ok := expr.(*ast.StarExpr); ok {
		expr = pointer.X
	}
	if generic, ok := expr.(*ast.IndexExpr); ok {
		expr = generic.X
	}
	if name, ok := expr.(*ast.Ident); ok {
		return []string{name.Name}
	}
	return nil
}

var (
	quoted = regexp.MustCompile("`([^`]+)`")
	symbol = regexp.MustCompile(`^[a-z]+\.[A-Za-z]\w*(\.\w+)?(/\w+)?$`)
)

// Each promise in docs/guarantees.md names the code that keeps it and a test that fails without it. Both exist.
func TestGuaranteesNameWhatExists(t *testing.T) {
	t.Parallel()
	known, sql := declared(t), schema(t)
	promises := 0
	for line := range strings.Lines(page(t, "guarantees.md")) {
		cells := strings.Split(strings.Trim(strings.TrimSpace(line), "|"), " | ")
		if !strings.HasPrefix(line, "| ") || len(cells) != 4 || strings.HasPrefix(line, "| Promise ") {
			continue // another table
		}
		promises++
		by, tests := quoted.FindAllStringSubmatch(cells[2], -1), quoted.FindAllStringSubmatch(cells[3], -1)
		if len(by) == 0 || len(tests) == 0 {
			t.Errorf("no code, or no test: %s", cells[0])
		}
		for _, match := range by {
			name := match[1]
			_, noFile := os.Stat(filepath.Join("..", "..", "..", filepath.FromSlash(name)))
			inSQL := regexp.MustCompile(`(?i)\b` + regexp.QuoteMeta(name) + `\b`)
			if !known[name] && noFile != nil && (symbol.MatchString(name) || !inSQL.MatchString(sql)) {
				t.Errorf("%s does not exist: %s", name, cells[0])
			}
		}
		for _, match := range tests {
			if name := match[1]; !symbol.MatchString(name) || !strings.Contains(name, ".Test") || !known[name] {
				t.Errorf("test %s does not exist: %s", name, cells[0])
			}
		}
	}
	if promises < 30 {
		t.Errorf("only %d promises found", promises)
	}
}
