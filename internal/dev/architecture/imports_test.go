// Package architecture tests rules that span packages. It restricts the imports between packages, so that the core does
// not depend on the domain.
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

// module returns the prefix of the paths of our packages.
var module = sync.OnceValue(func() string {
	text, err := os.ReadFile(filepath.Join("..", "..", "..", "go.mod"))
	if err != nil {
		panic(err)
	}
	return modfile.ModulePath(text) + "/"
})

// domain returns the folders of the domain, with its generated code: what internal/app/domain.go imports that no other
// file of internal/app may.
var domain = sync.OnceValue(func() (dirs []string) {
	wiring := filepath.Join("..", "..", "app", "domain.go")
	syntax, err := parser.ParseFile(token.NewFileSet(), wiring, nil, parser.ImportsOnly)
	if err != nil {
		panic(err)
	}
	for _, spec := range syntax.Imports {
		imported, _ := strconv.Unquote(spec.Path.Value)
		dir, ours := strings.CutPrefix(imported, module())
		if !ours || slices.Contains(dependencies["internal/app"], dir) {
			continue
		}
		if parts := strings.Split(dir, "/"); len(parts) > 3 && parts[1] == "gen" {
			dir = path.Join(parts[:3]...)
		}
		dirs = append(dirs, dir)
	}
	return dirs
})

// domainMayImport lists the packages of the core that packages of the domain may import, besides generated code.
var domainMayImport = []string{
	"internal/changes", "internal/inbox", "internal/messaging", "internal/outbox", "internal/postgres",
}

// programs lists folders of programs that drive the service from outside. They may import the domain, read all tables
// and open sessions of their own.
var programs []string

// dependencies lists the packages of ours that each package of the core may import. A package that is not listed may
// import none.
var dependencies = map[string][]string{
	"cmd/shop": {
		"internal/app", "internal/auth", "internal/bounds", "internal/deadletter", "internal/inbox",
		"internal/messaging", "internal/ops", "internal/outbox", "internal/postgres", "internal/rabbit",
		"internal/rpcserver", "internal/telemetry", "migrations",
	},
	"cmd/stack": {"internal/dev/localstack"},
	"internal/app": {
		"migrations", "internal/auth", "internal/changes", "internal/clients", "internal/deadletter",
		"internal/idempotency", "internal/inbox", "internal/messaging", "internal/ops", "internal/outbox",
		"internal/postgres", "internal/rabbit", "internal/rpcserver", "internal/session", "internal/telemetry",
	},
	"internal/bounds":  {},
	"internal/changes": {"internal/postgres", "internal/session"},
	"internal/clients": {},
	"internal/outbox": {
		"internal/deadletter", "internal/dev/failpoint", "internal/gen/outbox/v1", "internal/messaging",
		"internal/postgres", "internal/session",
	},
	"internal/inbox": {
		"internal/bounds", "internal/deadletter", "internal/dev/failpoint", "internal/messaging", "internal/postgres",
	},
	"internal/deadletter": {"internal/messaging", "internal/postgres"},
	"internal/ops": {
		"internal/deadletter", "internal/inbox", "internal/messaging", "internal/outbox", "internal/postgres",
		"internal/rabbit", "internal/session", "migrations",
	},
	"internal/rabbit":    {"internal/dev/failpoint", "internal/messaging"},
	"internal/telemetry": {"internal/bounds"},
	"internal/auth":      {"internal/bounds", "internal/gen/auth/v1", "internal/reload"},
	"internal/reload":    {},
	"internal/rpcserver": {
		"internal/auth", "internal/bounds", "internal/outbox", "internal/postgres", "internal/reload",
	},
	"internal/dev/testenv": {"internal/dev/localstack", "internal/session", "migrations"},
	"migrations":           {"internal/session"},
	"internal/postgres":    {"internal/session"},
	"internal/dev/chaos/victim": {
		"internal/inbox", "internal/messaging", "internal/outbox", "internal/postgres", "internal/rabbit",
	},
	"internal/dev/chaos":   {},
	"internal/gen/auth/v1": {},
	"internal/idempotency": {
		"internal/gen/idempotency/v1", "internal/messaging", "internal/outbox", "internal/postgres", "internal/unary",
	},
	"internal/dev/probe": {"internal/gen/auth/v1", "internal/gen/idempotency/v1"},
}

// allow adds the dependencies of a feature.
func allow(more map[string][]string) {
	for dir, imported := range more {
		dependencies[dir] = append(dependencies[dir], imported...)
	}
}

// withoutAMQP and withoutPgx list packages that must not import a client of the broker or of the database. The tests of
// features add their own.
var (
	withoutAMQP = []string{"internal/outbox", "internal/inbox", "internal/messaging"}
	withoutPgx  = []string{"internal/rabbit", "internal/messaging"}
)

// file is a Go file of the module.
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
		hidden := strings.HasPrefix(d.Name(), ".") && rel != "."
		if d.IsDir() && (hidden || rel == "bench" || rel == "conformance" || rel == "web" ||
			d.Name() == "node_modules") {
			return fs.SkipDir // bench and conformance are separate modules
		}
		if d.IsDir() || path.Ext(rel) != ".go" {
			return nil
		}
		f := file{dir: path.Dir(rel), name: path.Base(rel), test: strings.HasSuffix(rel, "_test.go")}
		f.syntax, err = parser.ParseFile(token.NewFileSet(), p, nil, 0)
		if err != nil {
			return err
		}
		for _, spec := range f.syntax.Imports {
			imported, _ := strconv.Unquote(spec.Path.Value)
			if ours, ok := strings.CutPrefix(imported, module()); ok {
				f.imports = append(f.imports, ours)
			} else {
				f.foreign = append(f.foreign, imported)
			}
		}
		all = append(all, f)
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
	return slices.ContainsFunc(domain(), func(d string) bool { return dir == d || strings.HasPrefix(dir, d+"/") })
}

func isProgram(f file) bool { return slices.Contains(programs, f.dir) }

// mayImport returns the packages of ours that a package may import.
func mayImport(dir string) []string {
	switch {
	case !isDomain(dir):
		return dependencies[dir]
	case strings.HasPrefix(dir, "internal/gen/"):
		return []string{"internal/gen/auth/v1", "internal/gen/idempotency/v1"}
	}
	return domainMayImport
}

func TestOnlyDomainGoNamesTheDomain(t *testing.T) {
	for _, f := range files(t) {
		if isDomain(f.dir) || isProgram(f) || f.dir == "internal/app" && f.name == "domain.go" {
			continue
		}
		for _, imported := range f.imports {
			if isDomain(imported) {
				t.Errorf("%s/%s imports %s: the core must not depend on the domain", f.dir, f.name, imported)
			}
		}
	}
}

func isGenerated(dir string) bool { return strings.HasPrefix(dir, "internal/gen/") }

// Generated packages import each other as their proto files do. The domain also uses those of other services.
func TestDependencies(t *testing.T) {
	for _, f := range files(t) {
		if f.test || isProgram(f) {
			continue
		}
		for _, imported := range f.imports {
			if isGenerated(imported) && (isGenerated(f.dir) || isDomain(f.dir)) {
				continue
			}
			if !isDomain(imported) && !slices.Contains(mayImport(f.dir), imported) {
				t.Errorf("%s/%s imports %s: add this dependency above only for a good reason", f.dir, f.name, imported)
			}
		}
	}
}

// Only internal/app uses both Postgres and RabbitMQ.
func TestPostgresAndRabbitMQAreKeptApart(t *testing.T) {
	for _, f := range files(t) {
		if f.test {
			continue
		}
		for _, imported := range f.foreign {
			amqp := strings.HasPrefix(imported, "github.com/rabbitmq/")
			pgx := strings.HasPrefix(imported, "github.com/jackc/pgx/")
			if amqp && (slices.Contains(withoutAMQP, f.dir) || isDomain(f.dir)) || pgx && slices.Contains(withoutPgx, f.dir) {
				t.Errorf("%s/%s imports %s", f.dir, f.name, imported)
			}
		}
	}
}

// tableOf matches the tables in an SQL statement.
var tableOf = regexp.MustCompile(`(?i)\b(?:FROM|INTO|UPDATE|JOIN|TABLE|TRUNCATE)\s+(?:ONLY\s+)?([a-z_]+)`)

func TestEachTableIsNamedByOnePackage(t *testing.T) {
	owners := map[string]map[string]bool{}
	for _, p := range migrationFiles(t) {
		text, err := os.ReadFile(p)
		if err != nil {
			t.Fatal(err)
		}
		for _, found := range regexp.MustCompile(`(?m)^CREATE TABLE (\w+) \(`).FindAllSubmatch(text, -1) {
			owners[string(found[1])] = map[string]bool{}
		}
	}
	for _, f := range files(t) {
		// Tests, programs outside of the service and the operators' side read all tables.
		if f.test || isProgram(f) || f.dir == "internal/ops" {
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
			t.Errorf("table %s is named by %v: want at most one package", table, slices.Sorted(maps.Keys(packages)))
		}
	}
}

// opens matches calls that open a session on the database. Only packages that set up sessions may use them.
var opens = regexp.MustCompile(
	`^(pgx\.Connect(Config|WithOptions)?|pgxpool\.New\w*|stdlib\.OpenDB|pgconn\.Connect(Config)?)$`)

func TestSessionsAreSetUp(t *testing.T) {
	mayOpen := []string{
		"internal/session", "internal/postgres", "internal/dev/testenv", "migrations", // through internal/session
		"internal/dev/localstack", // which checks that the server answers
	}
	for _, f := range files(t) {
		if f.test || isProgram(f) || slices.Contains(mayOpen, f.dir) {
			continue
		}
		ast.Inspect(f.syntax, func(n ast.Node) bool {
			selector, ok := n.(*ast.SelectorExpr)
			if !ok {
				return true
			}
			if pkg, ok := selector.X.(*ast.Ident); ok && opens.MatchString(pkg.Name+"."+selector.Sel.Name) {
				t.Errorf("%s/%s calls %s.%s: open sessions through internal/session or internal/postgres",
					f.dir, f.name, pkg.Name, selector.Sel.Name)
			}
			return true
		})
	}
}

// Only internal/postgres interprets errors of Postgres.
func TestOnePackageJudgesErrors(t *testing.T) {
	for _, f := range files(t) {
		// These format the texts of errors.
		texts := f.dir == "internal/telemetry" || f.dir == "internal/ops" && f.name == "doctor_cause.go"
		if f.test || f.dir == "internal/postgres" || texts {
			continue
		}
		ast.Inspect(f.syntax, func(n ast.Node) bool {
			selector, ok := n.(*ast.SelectorExpr)
			if ok && (selector.Sel.Name == "PgError" || selector.Sel.Name == "ConnectError") {
				t.Errorf("%s/%s uses %s: use internal/postgres (Classify, IsAway, IsLocked)",
					f.dir, f.name, selector.Sel.Name)
			}
			return true
		})
	}
}

// A handler that called another service with a client of its own making could show the errors of its transport to
// callers. Programs that are not servers may.
func TestHandlersCallThroughRPCClient(t *testing.T) {
	for _, f := range files(t) {
		if f.test || f.dir == "internal/clients" || !strings.HasPrefix(f.dir, "internal/") {
			continue
		}
		ast.Inspect(f.syntax, func(n ast.Node) bool {
			selector, ok := n.(*ast.SelectorExpr)
			if !ok || selector.Sel.Name != "NewClient" {
				return true
			}
			if pkg, ok := selector.X.(*ast.Ident); ok && pkg.Name == "connect" {
				t.Errorf("%s/%s calls connect.NewClient: use clients.New", f.dir, f.name)
			}
			return true
		})
	}
}

var parameter = regexp.MustCompile("^[\"`]&[a-zA-Z_]+=")

// Code must not append a parameter to a URL with &, because the user's URL may have no parameters yet.
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
				t.Errorf("%s/%s appends %s to a URL: use net/url, or testenv.With", f.dir, f.name, literal.Value)
			}
			return true
		})
	}
}
