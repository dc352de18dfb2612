package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// A service gets npm's packages from its template, unless they are other ones. npm is asked once for each list.
func TestPackagesAreInstalledOnce(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	write := func(name, text string) {
		t.Helper()
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	write("bin/npm",
		"#!/bin/sh\nmkdir -p node_modules\necho installed >>'"+dir+"/calls'\ncp package-lock.json node_modules/")
	for _, script := range []string{"packages.sh", "need.sh"} {
		text, err := os.ReadFile(filepath.Join("..", "..", "scripts", script))
		if err != nil {
			t.Fatal(err)
		}
		write("template/scripts/"+script, string(text))
		write("service/scripts/"+script, string(text))
	}
	const lock = "{\n  \"name\": \"NAME\",\n  \"version\": \"1\"\n}\n"
	write("template/web/package-lock.json", strings.ReplaceAll(lock, "NAME", "shop-web"))
	write("service/web/package-lock.json", strings.ReplaceAll(lock, "NAME", "billing-web"))
	install := func(tree string, calls int) {
		t.Helper()
		command := exec.CommandContext(t.Context(), "bash", "scripts/packages.sh", "web")
		command.Dir = filepath.Join(dir, tree)
		command.Env = append(os.Environ(), "PATH="+filepath.Join(dir, "bin")+":"+os.Getenv("PATH"),
			"PACKAGES_FROM="+filepath.Join(dir, "template"))
		if output, err := command.CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, output)
		}
		text, err := os.ReadFile(filepath.Join(dir, "calls"))
		if n := strings.Count(string(text), "installed"); err != nil || n != calls {
			t.Errorf("%s: npm was asked %d times, want %d, %v", tree, n, calls, err)
		}
		if _, err := os.Stat(filepath.Join(dir, tree, "web", "node_modules", "package-lock.json")); err != nil {
			t.Error(err)
		}
	}
	install("template", 1)
	install("template", 1)
	install("service", 1)
	write("service/web/package-lock.json", strings.ReplaceAll(lock, "1", "2"))
	install("service", 2)
	install("service", 2)
}
