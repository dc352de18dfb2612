//go:build new

package main

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
)

// These tests make services and run their tests, which takes minutes: `make new-test`. They start their own servers, as
// on a new user's machine.

// block is a code block of the guide: a script to run, or the contents of a file.
var block = regexp.MustCompile("(?ms)^```(\\w+)(?: file=(\\S+))?\n(.*?)^```$")

// The test follows the guide literally. The guide touches five files, and the resulting service works.
func TestMadeByTheGuide(t *testing.T) {
	template := checkout(t)
	text, err := os.ReadFile(filepath.Join(template, guide))
	if err != nil {
		t.Fatal(err)
	}
	s := &shell{t: t, dir: template, env: environment()}
	port := freePort(t)
	s.env = append(s.env, "API_PORT="+port)
	for _, name := range []string{"CONSOLE_PORT", "API_OPS_PORT", "RELAY_OPS_PORT", "CONSUMER_OPS_PORT",
		"CONSOLE_OPS_PORT"} {
		s.env = append(s.env, name+"="+freePort(t))
	}
	t.Cleanup(func() { s.run("make -s down || true") })
	touched := 0
	for _, found := range block.FindAllStringSubmatch(string(text), -1) {
		switch language, file, code := found[1], found[2], found[3]; {
		case file != "":
			touched++
			path := filepath.Join(s.dir, filepath.FromSlash(file))
			if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(path, []byte(code), 0o644); err != nil {
				t.Fatal(err)
			}
		case language == "sh":
			s.run(strings.ReplaceAll(code, "127.0.0.1:8080", "127.0.0.1:"+port))
		}
	}
	// Generated files do not count.
	changed := s.run(`git status --porcelain --untracked-files=all | grep -v '/gen/' | wc -l`)
	if touched != 5 || strings.TrimSpace(changed) != "5" {
		t.Errorf("the guide writes %d files, and %s changed, want 5", touched, changed)
	}
}

// With MADE_FULL=1 it runs all of make test. Otherwise it runs the tests that depend on names; the rest of the code is
// the same as in the tree of the guide.
func TestMadeWithTheExample(t *testing.T) {
	s := &shell{t: t, dir: checkout(t), env: environment()}
	s.run("go run ./cmd/new -example -module github.com/acme/pay -service pay ../pay\ncd ../pay")
	if status := s.run("git status --porcelain; git log --oneline | wc -l"); strings.TrimSpace(status) != "1" {
		t.Errorf("want one commit that contains everything: %s", status)
	}
	if os.Getenv("MADE_FULL") != "" {
		s.run("make lint test")
		return
	}
	s.run(`make lint
		make -s .stack/bin/stack
		.stack/bin/stack --profile test -- go test -race -count=1 ./cmd/pay/ ./cmd/demo/ ./internal/app/ \
			./internal/dev/architecture/ ./internal/orders/... ./migrations/
		.stack/bin/stack --profile test -- go run ./cmd/demo --orders 400`)
}

// Without features, all checks and tests of the rest pass. A tree without a single feature passes those that compile
// everything and start every process.
func TestMadeWithoutFeatures(t *testing.T) {
	s := &shell{t: t, dir: checkout(t), env: environment()}
	s.run("go run ./cmd/new " + withoutAll + " -module github.com/acme/lean -service lean ../lean\n" +
		"cd ../lean\nmake lint test")
	for _, f := range features {
		s.dir = filepath.Join(filepath.Dir(s.dir), "template")
		s.run(fmt.Sprintf(`
			go run ./cmd/new -bare -without %[1]s -module github.com/acme/lean -service lean ../without-%[1]s
			cd ../without-%[1]s
			make lint
			make -s .stack/bin/stack
			.stack/bin/stack --profile test -- go test -count=1 ./cmd/lean/ ./internal/app/`, f.name))
	}
}

// gonew rewrites only import paths, so the tree must not contain its module's name anywhere else.
func TestMadeByGonew(t *testing.T) {
	s := &shell{t: t, dir: checkout(t), env: environment()}
	proxy := t.TempDir()
	s.run(fmt.Sprintf(`
		GOBIN=%[1]s/bin go install golang.org/x/tools/cmd/gonew@v0.52.0
		versions=%[1]s/example.com/shop/@v
		mkdir -p "$versions"
		cp go.mod "$versions/v0.1.0.mod"
		echo '{"Version": "v0.1.0", "Time": "2026-01-01T00:00:00Z"}' >"$versions/v0.1.0.info"
		echo v0.1.0 >"$versions/list"
		git archive --prefix=example.com/shop@v0.1.0/ -o "$versions/v0.1.0.zip" HEAD \
			$(git ls-files | grep -v '^bench/\|^conformance/\|^tools/')
		GOPROXY=file://%[1]s GONOSUMDB='*' GOFLAGS=-modcacherw GOMODCACHE=%[1]s/cache \
			%[1]s/bin/gonew example.com/shop@v0.1.0 github.com/acme/gone ../gone
		cd ../gone
		go vet ./...
		go build -o .stack/bin/stack ./cmd/stack
		.stack/bin/stack --profile test -- go test -count=1 ./cmd/shop/ ./cmd/demo/ ./internal/app/ \
			./internal/dev/architecture/ ./internal/orders/ ./migrations/
		.stack/bin/stack --profile test -- go run ./cmd/demo --orders 400`, proxy))
}

// checkout makes a repository of the current files in a folder of the test, so that new services are made beside it in
// that folder.
func checkout(t *testing.T) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "template")
	s := &shell{t: t, dir: filepath.Join("..", ".."), env: environment()}
	s.run(`mkdir "` + dir + `"
		git ls-files -z --cached --others --exclude-standard | tar --null --ignore-failed-read -c -T - | tar -x -C "` +
		dir + `"
		cd "` + dir + `"
		git init -q -b main
		git add -A
		git -c user.name=test -c user.email=test@localhost commit -q -m template`)
	return dir
}

// environment is the process's environment without servers, and without the variables that make passes to its children.
func environment() []string {
	unwanted := []string{
		"POSTGRES_URL", "AMQP_URL", "RABBITMQ_MANAGEMENT_URL", "MAKEFLAGS", "MFLAGS", "MAKELEVEL",
	}
	return slices.DeleteFunc(os.Environ(), func(variable string) bool {
		name, _, _ := strings.Cut(variable, "=")
		return slices.Contains(unwanted, name)
	})
}

// shell runs scripts one after another. Each starts in the folder in which the previous one ended.
type shell struct {
	t   *testing.T
	dir string
	env []string
}

func (s *shell) run(script string) (output string) {
	s.t.Helper()
	began := time.Now()
	command := exec.Command("bash", "-euo", "pipefail", "-c", script+"\npwd >&3")
	command.Dir, command.Env = s.dir, s.env
	where, err := os.CreateTemp(s.t.TempDir(), "pwd")
	if err != nil {
		s.t.Fatal(err)
	}
	defer where.Close()
	command.ExtraFiles = []*os.File{where}
	var out bytes.Buffer
	command.Stdout, command.Stderr = &out, &out
	if err := command.Run(); err != nil {
		// Omit the log lines of services under test, and show failures before the output, which may be very long.
		text := regexp.MustCompile(`(?m)^time=.*\n`).ReplaceAllString(out.String(), "")
		failed := regexp.MustCompile(`(?m)^ *(--- FAIL|\w+_test\.go:\d+:).*\n`).FindAllString(text, 100)
		s.t.Fatalf("%s: %v\n%s\n%s", script, err, strings.Join(failed, ""), text[max(0, len(text)-10_000):])
	}
	s.t.Logf("%4.0f s  %s", time.Since(began).Seconds(), strings.TrimSpace(script))
	if dir, err := os.ReadFile(where.Name()); err == nil {
		s.dir = strings.TrimSpace(string(dir))
	}
	return out.String()
}

func freePort(t *testing.T) string {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	_, port, err := net.SplitHostPort(listener.Addr().String())
	if err = errors.Join(err, listener.Close()); err != nil {
		t.Fatal(err)
	}
	return port
}
