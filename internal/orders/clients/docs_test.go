package clients

import (
	"cmp"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// example is a block of docs/clients.md that is run, and the lines that it prints as the document shows them.
type example struct {
	language, code string
	prints         []string
}

var block = regexp.MustCompile("(?ms)^```(\\w+)( setup)?\n(.*?)^```$")

// examples returns the examples of the document in their order, and the shell code that all of them begin with.
func examples(t *testing.T) (all []example, setup string) {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(root, "docs", "clients.md"))
	if err != nil {
		t.Fatal(err)
	}
	for _, found := range block.FindAllStringSubmatch(string(text), -1) {
		language, code := found[1], found[3]
		switch {
		case found[2] != "":
			setup += code
		case language == "text":
			last := &all[len(all)-1]
			last.prints = strings.Split(strings.TrimSpace(code), "\n")
		default:
			all = append(all, example{language: language, code: code})
		}
	}
	return all, setup
}

// The document's examples work, one after the other as a reader would run them, and print what it says.
func TestDocs(t *testing.T) {
	t.Parallel()
	if err := install(); err != nil {
		t.Fatal(err)
	}
	addr, amqpURL := serveQueues(t)
	binary := filepath.Join(root, ".stack", "bin", "shop-of-the-docs") // kept: the next run replaces it
	if output, err := exec.Command("go", "build", "-o", binary, "example.com/shop/cmd/shop").CombinedOutput(); err != nil {
		t.Fatalf("build shop: %v\n%s", err, output)
	}
	all, setup := examples(t)
	languages := map[string]int{}
	for _, one := range all {
		languages[one.language]++
		t.Run(one.language, func(t *testing.T) {
			output := one.run(t, setup, "API=http://"+addr, "AMQP_URL="+amqpURL, "TOKEN="+token, "SHOP="+binary)
			rest := squeeze(output)
			for _, line := range one.prints {
				_, after, found := strings.Cut(rest, squeeze(line))
				if !found {
					t.Fatalf("%s\nprints\n%s\nand not\n%s", one.code, output, line)
				}
				rest = after
			}
			if len(one.prints) == 0 {
				t.Errorf("the document does not say what this prints:\n%s", one.code)
			}
		})
	}
	if languages["sh"] < 12 || languages["ts"] != 1 || languages["go"] != 2 {
		t.Errorf("found %v: are these all?", languages)
	}
}

// squeeze takes blanks away: those in JSON mean nothing, and protobuf varies them on purpose.
func squeeze(text string) string { return strings.Join(strings.Fields(text), "") }

// run runs an example at the top of the repository, and returns what it prints.
func (e example) run(t *testing.T, setup string, environment ...string) string {
	t.Helper()
	var command *exec.Cmd
	switch e.language {
	case "sh":
		command = exec.CommandContext(t.Context(), "bash", "-euo", "pipefail", "-c", setup+e.code)
	case "go":
		// Within the module, whose internal packages it uses, and where ./... does not look.
		command = exec.CommandContext(t.Context(), "go", "run", write(t, ".stack", "main.go", e.code))
	case "ts":
		source := write(t, "web/dist", "example.ts", e.code)
		folder := filepath.Dir(source)
		config := `{"extends": "../../tsconfig.json", "compilerOptions": {"rootDir": ".", "outDir": "."}, "include": [], "files": ["example.ts"]}`
		if err := os.WriteFile(filepath.Join(folder, "tsconfig.json"), []byte(config), 0o600); err != nil {
			t.Fatal(err)
		}
		command = exec.CommandContext(t.Context(), "bash", "-c", `web/node_modules/.bin/tsc -p "$1" && node "$1/example.js"`, "bash", folder)
	default:
		t.Fatalf("nobody knows how to run %s", e.language)
	}
	command.Dir, command.Env = root, append(os.Environ(), environment...)
	output, err := command.CombinedOutput()
	if err != nil {
		t.Fatalf("%v of\n%s\n%s", err, e.code, cmp.Or(string(output), "(nothing printed)"))
	}
	return string(output)
}

// write writes a file into a new folder below one of the repository's, and returns its name.
func write(t *testing.T, below, name, content string) string {
	t.Helper()
	below = filepath.Join(root, below)
	if err := os.MkdirAll(below, 0o755); err != nil {
		t.Fatal(err)
	}
	folder, err := os.MkdirTemp(below, "docs-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(folder) })
	path := filepath.Join(folder, name)
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}
