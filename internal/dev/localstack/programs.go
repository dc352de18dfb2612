//go:build unix

package localstack

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// programs contains the server programs of this machine. Empty means missing.
type programs struct {
	postgresBin    string // folder with postgres and initdb
	rabbitmqServer string
	epmd           string
}

func (p programs) postgres() string { return filepath.Join(p.postgresBin, "postgres") }
func (p programs) initdb() string   { return filepath.Join(p.postgresBin, "initdb") }

// basebackup is in the folder of the server's file, and not always in the folder of links to it.
func (p programs) basebackup() string { return filepath.Join(p.postgresTools(), "pg_basebackup") }

// postgresTools returns the folder that also contains pg_dump and the other tools.
func (p programs) postgresTools() string {
	if server, err := filepath.EvalSymlinks(p.postgres()); err == nil {
		return filepath.Dir(server)
	}
	return p.postgresBin
}

// missing returns the Debian names of the packages to install.
func (p programs) missing() []string {
	var packages []string
	if p.postgresBin == "" {
		packages = append(packages, "postgresql")
	}
	if p.rabbitmqServer == "" || p.epmd == "" {
		packages = append(packages, "rabbitmq-server")
	}
	return packages
}

// findPrograms searches PATH and the folders of the packages of Debian, Red Hat and
// Homebrew, which usually are not in a developer's PATH.
func findPrograms() programs {
	var found programs
	for _, postgres := range append(inPath("postgres"), newestFirst(
		"/usr/lib/postgresql/*/bin/postgres",
		"/usr/pgsql-*/bin/postgres",
		"/opt/homebrew/opt/postgresql@*/bin/postgres",
		"/usr/local/opt/postgresql@*/bin/postgres",
	)...) {
		bin := filepath.Dir(postgres)
		if executable(filepath.Join(bin, "initdb")) {
			found.postgresBin = bin
			break
		}
	}
	// Debian's rabbitmq-server in PATH is a wrapper that requires its own user and log
	// folder, so prefer the script that it calls.
	found.rabbitmqServer = firstExecutable(append(
		[]string{"/usr/lib/rabbitmq/bin/rabbitmq-server"},
		append(inPath("rabbitmq-server"), "/opt/homebrew/sbin/rabbitmq-server", "/usr/local/sbin/rabbitmq-server")...))
	found.epmd = firstExecutable(append(inPath("epmd"), newestFirst(
		"/usr/lib/erlang/erts-*/bin/epmd",
		"/usr/lib64/erlang/erts-*/bin/epmd",
		"/opt/homebrew/opt/erlang/lib/erlang/erts-*/bin/epmd",
		"/usr/local/opt/erlang/lib/erlang/erts-*/bin/epmd",
	)...))
	return found
}

// ensurePrograms finds the programs. It installs missing ones if that needs no
// password, and returns an error if any is still missing.
func ensurePrograms(ctx context.Context, log io.Writer) (programs, error) {
	found := findPrograms()
	if len(found.missing()) == 0 {
		return found, nil
	}
	if err := install(ctx, log, func() []string { return findPrograms().missing() }); err != nil {
		return programs{}, err
	}
	found = findPrograms()
	if packages := found.missing(); len(packages) > 0 {
		return programs{}, fmt.Errorf("installed %s, but cannot find the programs", strings.Join(packages, ", "))
	}
	return found, nil
}

// inPath returns the absolute path of a program in PATH as a list of at most one.
func inPath(name string) []string {
	path, err := exec.LookPath(name)
	if err != nil {
		return nil
	}
	if path, err = filepath.Abs(path); err != nil {
		return nil
	}
	return []string{path}
}

// newestFirst expands the patterns in order, each with the highest version first.
func newestFirst(patterns ...string) []string {
	var paths []string
	for _, pattern := range patterns {
		matches, _ := filepath.Glob(pattern) // the patterns are well-formed constants
		slices.SortFunc(matches, func(a, b string) int { return cmp.Compare(versionIn(b), versionIn(a)) })
		paths = append(paths, matches...)
	}
	return paths
}

// versionIn returns the first number in a path that follows a separator, such as 15 in
// /usr/lib/postgresql/15/bin. Text order would put 9 after 15.
func versionIn(path string) float64 {
	for _, part := range strings.FieldsFunc(path, func(r rune) bool { return strings.ContainsRune("/@-", r) }) {
		major, rest, _ := strings.Cut(part, ".")
		minor, _, _ := strings.Cut(rest, ".")
		if version, err := strconv.ParseFloat(strings.TrimSuffix(major+"."+minor, "."), 64); err == nil {
			return version
		}
	}
	return 0
}

func firstExecutable(paths []string) string {
	for _, path := range paths {
		if executable(path) {
			return path
		}
	}
	return ""
}

func executable(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.Mode().IsRegular() && info.Mode()&0o111 != 0
}
