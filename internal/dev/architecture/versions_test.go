package architecture

import (
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"golang.org/x/mod/modfile"
)

// manifests returns the folders with a file of this name, relative to the root.
func manifests(t *testing.T, name string) (folders []string) {
	t.Helper()
	root := filepath.Join("..", "..", "..")
	err := filepath.WalkDir(root, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		hidden := strings.HasPrefix(d.Name(), ".") && p != root
		if d.IsDir() && (hidden || d.Name() == "node_modules" || d.Name() == "testdata" || d.Name() == "bin") {
			return fs.SkipDir
		}
		if d.Name() == name {
			rel, err := filepath.Rel(root, filepath.Dir(p))
			folders = append(folders, path.Join("/", filepath.ToSlash(rel)))
			return err
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(folders) == 0 {
		t.Fatalf("no %s found: looking in the wrong place", name)
	}
	return folders
}

func read(t *testing.T, elements ...string) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(append([]string{"..", "..", ".."}, elements...)...))
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// go.mod names the version of Go for advisories and builds. Everything else uses the same version.
func TestOneVersionOfGo(t *testing.T) {
	version := func(folder string) string {
		parsed, err := modfile.Parse("go.mod", []byte(read(t, folder, "go.mod")), nil)
		if err != nil {
			t.Fatal(err)
		}
		if parsed.Toolchain != nil {
			t.Errorf("%s/go.mod names a toolchain: the line go is enough", folder)
		}
		return parsed.Go.Version
	}
	want := version("/")
	for _, folder := range manifests(t, "go.mod") {
		if got := version(folder); got != want {
			t.Errorf("%s/go.mod is for Go %s, but the main module for %s", folder, got, want)
		}
	}
	images := regexp.MustCompile(`golang:([\d.]+)`).FindAllStringSubmatch(read(t, "Dockerfile"), -1)
	for _, image := range images {
		if image[1] != want {
			t.Errorf("the Dockerfile builds with Go %s, but go.mod is for %s", image[1], want)
		}
	}
	if len(images) == 0 {
		t.Error("the Dockerfile has no Go image")
	}
	editors := read(t, ".devcontainer", "devcontainer.json")
	container := regexp.MustCompile(`devcontainers/go:([\d.]+)`).FindStringSubmatch(editors)
	if container == nil || !strings.HasPrefix(want+".", container[1]+".") {
		t.Errorf("the development container has %v, but go.mod is for %s", container, want)
	}
	steps := regexp.MustCompile(`(?m)uses: actions/setup-go@.*\n\s*with: (.*)`)
	found := steps.FindAllStringSubmatch(read(t, ".github", "workflows", "ci.yml"), -1)
	for _, step := range found {
		if !strings.Contains(step[1], "go-version-file: go.mod") {
			t.Errorf("a step of ci.yml sets up Go with %s: want go-version-file: go.mod", step[1])
		}
	}
	if len(found) == 0 {
		t.Error("no step of ci.yml sets up Go")
	}
}

// Dependabot updates each folder that pins versions.
func TestDependabotCoversEveryManifest(t *testing.T) {
	entries := strings.Split(read(t, ".github", "dependabot.yml"), "- package-ecosystem: ")
	for ecosystem, name := range map[string]string{"gomod": "go.mod", "npm": "package.json"} {
		var covered []string
		for _, entry := range entries {
			if strings.HasPrefix(entry, ecosystem+"\n") {
				for _, quoted := range regexp.MustCompile(`"(/[^"]*)"`).FindAllStringSubmatch(entry, -1) {
					covered = append(covered, quoted[1])
				}
			}
		}
		for _, folder := range manifests(t, name) {
			if !slices.Contains(covered, folder) {
				t.Errorf("dependabot.yml does not cover %s (%s)", folder, ecosystem)
			}
		}
	}
}
