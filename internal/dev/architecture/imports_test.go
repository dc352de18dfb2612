// Package house holds the test that keeps the arrows between the packages, so that the example domain can be deleted and the core kept.
package architecture

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	"golang.org/x/mod/modfile"
)

// module is what the paths of our packages begin with.
var module = sync.OnceValue(func() string {
	text, err := os.ReadFile(filepath.Join("..", "..", "..", "go.mod"))
	if err != nil {
		panic(err)
	}
	return modfile.ModulePath(text) + "/"
})

// domain is the example: what a user of the template deletes, and what demonstrates it.
var domain = []string{"internal/orders", "internal/gen/orders", "cmd/demo"}

// arrows says which packages of the core each package may import. What is not listed may import nothing of ours.
var arrows = map[string][]string{
	"cmd/shop": {
		"internal/app", "internal/auth", "internal/bounds", "internal/deadletter", "internal/inbox", "internal/messaging", "internal/ops", "internal/outbox", "internal/postgres", "internal/rabbit",
		"internal/rabbitrpc", "internal/rpcserver", "internal/telemetry", "migrations",
	},
	"cmd/stack": {"internal/dev/localstack"},
	"internal/app": {
		"migrations",
		"internal/auth", "internal/changes", "internal/console", "internal/deadletter", "internal/gen/ops/v1/opsv1connect", "internal/idempotency", "internal/inbox", "internal/messaging",
		"internal/operations", "internal/ops", "internal/outbox", "internal/postgres", "internal/rabbit", "internal/rabbitrpc", "internal/rpcserver", "internal/session", "internal/telemetry",
	},
	"internal/bounds":     {},
	"internal/changes":    {"internal/postgres", "internal/session"},
	"internal/orders":     {"internal/changes", "internal/inbox", "internal/messaging", "internal/outbox", "internal/postgres"},
	"internal/outbox":     {"internal/deadletter", "internal/dev/failpoint", "internal/messaging", "internal/postgres", "internal/session"},
	"internal/inbox":      {"internal/bounds", "internal/deadletter", "internal/dev/failpoint", "internal/messaging", "internal/postgres"},
	"internal/deadletter": {"internal/messaging", "internal/postgres"},
	"internal/ops": {"internal/deadletter", "internal/gen/shop/operations/v1", "internal/inbox", "internal/messaging", "internal/operations",
		"internal/outbox", "internal/postgres", "internal/rabbit", "internal/session", "migrations"},
	"internal/console": {
		"internal/bounds", "internal/auth", "internal/deadletter", "internal/gen/shop/operations/v1", "internal/gen/ops/v1", "internal/gen/ops/v1/opsv1connect", "internal/inbox",
		"internal/messaging", "internal/operations", "internal/ops", "internal/outbox", "internal/postgres", "internal/rabbit",
	},
	"internal/rabbit":           {"internal/dev/failpoint", "internal/messaging"},
	"internal/telemetry":        {"internal/bounds"},
	"internal/rabbitrpc":        {"internal/bounds", "internal/rabbit"},
	"internal/auth":             {"internal/bounds", "internal/gen/auth/v1", "internal/reload"},
	"internal/reload":           {},
	"internal/rpcserver":        {"internal/auth", "internal/bounds", "internal/outbox", "internal/postgres", "internal/reload"},
	"internal/dev/testenv":      {"internal/dev/localstack", "internal/session", "migrations"},
	"migrations":                {"internal/session"},
	"internal/postgres":         {"internal/session"},
	"internal/dev/chaos/victim": {"internal/changes", "internal/inbox", "internal/messaging", "internal/operations", "internal/outbox", "internal/postgres", "internal/dev/probe", "internal/rabbit", "internal/rpcserver"},
	"internal/dev/chaos":        {},
	"internal/gen/auth/v1":      {},
	"internal/gen/orders/v1":    {"internal/gen/auth/v1", "internal/gen/idempotency/v1"},

	"internal/idempotency": {"internal/gen/idempotency/v1", "internal/messaging", "internal/outbox", "internal/postgres", "internal/unary"},
	"internal/operations": {"internal/bounds", "internal/changes", "internal/deadletter", "internal/gen/shop/operations/v1", "internal/gen/shop/operations/v1/operationsv1connect",
		"internal/inbox", "internal/messaging", "internal/outbox", "internal/postgres", "internal/unary"},
	"internal/dev/probe": {"internal/gen/auth/v1", "internal/gen/idempotency/v1"},

	"internal/gen/ops/v1":                                 {"internal/gen/auth/v1"},
	"internal/gen/ops/v1/opsv1connect":                    {"internal/gen/ops/v1"},
	"internal/gen/shop/operations/v1":                     {"internal/gen/auth/v1"},
	"internal/gen/shop/operations/v1/operationsv1connect": {"internal/gen/shop/operations/v1"},
}

// file is one Go file of the module.
type file struct {
	dir, name string
	test      bool
	imports   []string // of the module, without its path
	foreign   []string
	syntax    *ast.File
}

func files(t *testing.T) []file {
	t.Helper()
	root := filepath.Join("..", "..", "..")
	var all []file
	err := filepath.WalkDir(root, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, _ := filepath.Rel(root, p)
		rel = filepath.ToSlash(rel)
		if d.IsDir() && (rel == "bench" || rel == "conformance" || rel == "web" || strings.HasPrefix(d.Name(), ".") && rel != "." || d.Name() == "node_modules") {
			return fs.SkipDir // bench and conformance are modules of their own
		}
		if d.IsDir() || path.Ext(rel) != ".go" {
			return nil
		}
		one := file{dir: path.Dir(rel), name: path.Base(rel), test: strings.HasSuffix(rel, "_test.go")}
		one.syntax, err = parser.ParseFile(token.NewFileSet(), p, nil, 0)
		if err != nil {
			return err
		}
		for _, spec := range one.syntax.Imports {
			imported, _ := strconv.Unquote(spec.Path.Value)
			if ours, ok := strings.CutPrefix(imported, module()); ok {
				one.imports = append(one.imports, ours)
			} else {
				one.foreign = append(one.foreign, imported)
			}
		}
		all = append(all, one)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(all) < 20 {
		t.Fatalf("only %d Go files found: looking in the wrong place", len(all))
	}
	return all
}

func isDomain(dir string) bool {
	return slices.ContainsFunc(domain, func(d string) bool { return dir == d || strings.HasPrefix(dir, d+"/") })
}

func TestOnlyDomainGoNamesTheDomain(t *testing.T) {
	for _, f := range files(t) {
		if isDomain(f.dir) || f.dir == "internal/app" && f.name == "domain.go" {
			continue
		}
		for _, imported := range f.imports {
			if isDomain(imported) {
				t.Errorf("%s/%s imports %s: the core must not know the example domain", f.dir, f.name, imported)
			}
		}
	}
}

func TestArrows(t *testing.T) {
	for _, f := range files(t) {
		if f.test || f.dir == "cmd/demo" {
			continue
		}
		for _, imported := range f.imports {
			if !isDomain(imported) && !slices.Contains(arrows[f.dir], imported) {
				t.Errorf("%s/%s imports %s: if that arrow is right, add it here", f.dir, f.name, imported)
			}
		}
	}
}

// The database's side and the broker's side meet in internal/app only.
func TestPostgresAndRabbitMQAreKeptApart(t *testing.T) {
	for _, f := range files(t) {
		if f.test {
			continue
		}
		for _, imported := range f.foreign {
			amqp, pgx := strings.HasPrefix(imported, "github.com/rabbitmq/"), strings.HasPrefix(imported, "github.com/jackc/pgx/")
			switch {
			case amqp && (f.dir == "internal/outbox" || f.dir == "internal/inbox" || f.dir == "internal/operations" || f.dir == "internal/orders" || f.dir == "internal/messaging"),
				pgx && (f.dir == "internal/rabbit" || f.dir == "internal/rabbitrpc" || f.dir == "internal/messaging"):
				t.Errorf("%s/%s imports %s", f.dir, f.name, imported)
			}
		}
	}
}

// tableOf finds the tables that an SQL statement names.
var tableOf = regexp.MustCompile(`(?i)\b(?:FROM|INTO|UPDATE|JOIN|TABLE|TRUNCATE)\s+(?:ONLY\s+)?([a-z_]+)`)

func TestEachTableIsNamedByOnePackage(t *testing.T) {
	owners := map[string]map[string]bool{}
	migrations, err := filepath.Glob(filepath.Join("..", "..", "..", "migrations", "*.sql"))
	if err != nil || len(migrations) == 0 {
		t.Fatalf("no migrations found: %v", err)
	}
	for _, p := range migrations {
		text, err := os.ReadFile(p)
		if err != nil {
			t.Fatal(err)
		}
		for _, found := range regexp.MustCompile(`(?m)^CREATE TABLE (\w+) \(`).FindAllSubmatch(text, -1) {
			owners[string(found[1])] = map[string]bool{}
		}
	}
	for _, f := range files(t) {
		// Tests, the demo's ledger and the operators' side look at everything.
		if f.test || f.dir == "cmd/demo" || f.dir == "internal/ops" {
			continue
		}
		ast.Inspect(f.syntax, func(n ast.Node) bool {
			literal, ok := n.(*ast.BasicLit)
			if !ok || literal.Kind != token.STRING {
				return true
			}
			for _, found := range tableOf.FindAllStringSubmatch(literal.Value, -1) {
				if packages, ours := owners[found[1]]; ours {
					packages[f.dir] = true
				}
			}
			return true
		})
	}
	for table, packages := range owners {
		if len(packages) > 1 {
			t.Errorf("table %s is named by %v, want one package at most", table, slices.Sorted(maps.Keys(packages)))
		}
	}
}

// opens finds what makes a session on the database. Only those who set it up first may do so.
var opens = regexp.MustCompile(`^(pgx\.Connect(Config|WithOptions)?|pgxpool\.New\w*|stdlib\.OpenDB|pgconn\.Connect(Config)?)$`)

func TestSessionsAreSetUp(t *testing.T) {
	mayOpen := []string{
		"internal/session", "internal/postgres", "internal/dev/testenv", "migrations", // through internal/session
		"internal/dev/localstack", "cmd/demo", // which only look, or ask whether the server is there
	}
	for _, f := range files(t) {
		if f.test || slices.Contains(mayOpen, f.dir) {
			continue
		}
		ast.Inspect(f.syntax, func(n ast.Node) bool {
			selector, ok := n.(*ast.SelectorExpr)
			if !ok {
				return true
			}
			if pkg, ok := selector.X.(*ast.Ident); ok && opens.MatchString(pkg.Name+"."+selector.Sel.Name) {
				t.Errorf("%s/%s calls %s.%s: open sessions through internal/session or internal/postgres", f.dir, f.name, pkg.Name, selector.Sel.Name)
			}
			return true
		})
	}
}

// One package knows what an error of Postgres means.
func TestOnePackageJudgesErrors(t *testing.T) {
	for _, f := range files(t) {
		words := f.dir == "internal/telemetry" || f.dir == "internal/ops" && f.name == "doctor_cause.go" // they see to texts
		if f.test || f.dir == "internal/postgres" || words {
			continue
		}
		ast.Inspect(f.syntax, func(n ast.Node) bool {
			if selector, ok := n.(*ast.SelectorExpr); ok && (selector.Sel.Name == "PgError" || selector.Sel.Name == "ConnectError") {
				t.Errorf("%s/%s looks at %s: ask internal/postgres (Classify, IsAway, IsLocked)", f.dir, f.name, selector.Sel.Name)
			}
			return true
		})
	}
}

var parameter = regexp.MustCompile("^[\"`]&[a-zA-Z_]+=")

// A parameter is never pasted to the end of a URL: the one that the user names may have none yet.
func TestParametersAreNotPastedToURLs(t *testing.T) {
	t.Parallel()
	for _, f := range files(t) {
		ast.Inspect(f.syntax, func(n ast.Node) bool {
			sum, ok := n.(*ast.BinaryExpr)
			if !ok || sum.Op != token.ADD {
				return true
			}
			literal, ok := sum.Y.(*ast.BasicLit)
			if ok && literal.Kind == token.STRING && parameter.MatchString(literal.Value) {
				t.Errorf("%s/%s pastes %s to a URL; use net/url, or testenv.With", f.dir, f.name, literal.Value)
			}
			return true
		})
	}
}
