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

// example is a block of code in docs/client-examples.md, and the lines that it prints according to the document.
type example struct {
	language, code string
	prints         []string
}

var block = regexp.MustCompile("(?ms)^```(\\w+)( setup)?\n(.*?)^```$")

// examples returns the examples of the document in their order, and the setup code that precedes every shell example.
func examples(t *testing.T) (all []example, setup string) {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(root, "docs", "client-examples.md"))
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

// The document's examples work one after the other, as a reader would run them, and print what the document shows.
func TestDocs(t *testing.T) {
	t.Parallel()
	if err := install(); err != nil {
		t.Fatal(err)
	}
	addr, amqpURL := serveQueues(t)
	binary := filepath.Join(root, ".stack", "bin", "shop-of-the-docs") // not removed: the next run overwrites it
	output, err := exec.Command("go", "build", "-o", binary, "example.com/shop/cmd/shop").CombinedOutput()
	if err != nil {
		t.Fatalf("build shop: %v\n%s", err, output)
	}
	all, setup := examples(t)
	languages := map[string]int{}
	for _, example := range all {
		languages[example.language]++
		t.Run(example.language, func(t *testing.T) {
			output := example.run(t, setup, "API=http://"+addr, "AMQP_URL="+amqpURL, "TOKEN="+token, "SHOP="+binary)
			rest := squeeze(output)
			for _, line := range example.prints {
				_, after, found := strings.Cut(rest, squeeze(line))
				if !found {
					t.Fatalf("%s\nprints\n%s\nwithout\n%s", example.code, output, line)
				}
				rest = after
			}
			if len(example.prints) == 0 {
				t.Errorf("the document does not show what this prints:\n%s", example.code)
			}
		})
	}
	if languages["sh"] < 12 || languages["ts"] != 1 || languages["go"] != 2 {
		t.Errorf("found examples %v; some may be missing", languages)
	}
}

// squeeze removes whitespace, which means nothing in JSON and which protobuf varies on purpose.
func squeeze(text string) string { return strings.Join(strings.Fields(text), "") }

// run runs an example at the top of the repository, and returns its output.
func (e example) run(t *testing.T, setup string, environment ...string) string {
	t.Helper()
	var command *exec.Cmd
	switch e.language {
	case "sh":
		command = exec.CommandContext(t.Context(), "bash", "-euo", "pipefail", "-c", setup+e.code)
	case "go":
		// The file must be in the module, because it imports internal packages, but in a folder that ./... ignores.
		command = exec.CommandContext(t.Context(), "go", "run", write(t, ".stack", "main.go", e.code))
	case "ts":
		source := write(t, "web/dist", "example.ts", e.code)
		folder := filepath.Dir(source)
		const config = `{"extends": "../../tsconfig.json", "compilerOptions": {"rootDir": ".", "outDir": "."},
			"include": [], "files": ["example.ts"]}`
		if err := os.WriteFile(filepath.Join(folder, "tsconfig.json"), []byte(config), 0o600); err != nil {
			t.Fatal(err)
		}
		const script = `web/node_modules/.bin/tsc -p "$1" && node "$1/example.js"`
		command = exec.CommandContext(t.Context(), "bash", "-c", script, "bash", folder)
	default:
		t.Fatalf("this test cannot run %s", e.language)
	}
	command.Dir, command.Env = root, append(os.Environ(), environment...)
	output, err := command.CombinedOutput()
	if err != nil {
		t.Fatalf("%v of\n%s\n%s", err, e.code, cmp.Or(string(output), "(nothing printed)"))
	}
	return string(output)
}

// write writes a file to a new folder below a folder of the repository, and returns the file's path.
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
