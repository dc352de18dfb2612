package architecture

import (
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// page returns the text of a page in docs/.
func page(t *testing.T, name string) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("..", "..", "..", "docs", name))
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

var (
	link    = regexp.MustCompile(`\]\(([^)\s]+)\)`)
	heading = regexp.MustCompile(`(?m)^#+ (.+)$`)
	fenced  = regexp.MustCompile("(?ms)^```.*?^```$")
	dropped = regexp.MustCompile(`[^\p{L}\p{N}\- _]`)
)

// anchors returns the anchors of a page's headings as GitHub makes them.
func anchors(text string) (all []string) {
	for _, match := range heading.FindAllStringSubmatch(fenced.ReplaceAllString(text, ""), -1) {
		all = append(all, strings.ReplaceAll(dropped.ReplaceAllString(strings.ToLower(match[1]), ""), " ", "-"))
	}
	return all
}

// Every link from our pages to a page or a file has a target.
func TestLinksLeadSomewhere(t *testing.T) {
	t.Parallel()
	root := filepath.Join("..", "..", "..")
	var pages []string
	for _, pattern := range []string{"*.md", "docs/*.md", "docs/adr/*.md", "proto/*.md"} {
		found, err := filepath.Glob(filepath.Join(root, pattern))
		if err != nil {
			t.Fatal(err)
		}
		pages = append(pages, found...)
	}
	links := 0
	for _, name := range pages {
		text, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		for _, found := range link.FindAllStringSubmatch(fenced.ReplaceAllString(string(text), ""), -1) {
			target, anchor, _ := strings.Cut(found[1], "#")
			if strings.Contains(target, "://") {
				continue
			}
			links++
			file := filepath.Join(filepath.Dir(name), target)
			if target == "" {
				file = name
			}
			if _, err := os.Stat(file); err != nil {
				t.Errorf("%s links to %s, which does not exist", name, found[1])
				continue
			}
			if anchor == "" || filepath.Ext(file) != ".md" {
				continue
			}
			if linked, err := os.ReadFile(file); err != nil || !slices.Contains(anchors(string(linked)), anchor) {
				t.Errorf("%s links to %s, but there is no such heading", name, found[1])
			}
		}
	}
	if links < 50 {
		t.Errorf("only %d links found", links)
	}
}

// docs/README.md links to every page.
func TestEveryPageIsInTheIndex(t *testing.T) {
	t.Parallel()
	index := page(t, "README.md")
	root := filepath.Join("..", "..", "..", "docs")
	for _, pattern := range []string{"*.md", "adr/*.md"} {
		found, err := filepath.Glob(filepath.Join(root, pattern))
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range found {
			rel, _ := filepath.Rel(root, name)
			if rel != "README.md" && !strings.Contains(index, "]("+filepath.ToSlash(rel)+")") {
				t.Errorf("docs/README.md does not link to %s", rel)
			}
		}
	}
}

// cellsOf returns the cells of a table row, or nil for other lines.
func cellsOf(line string) (cells []string) {
	if !strings.HasPrefix(line, "|") {
		return nil
	}
	for _, cell := range strings.Split(strings.Trim(strings.TrimSpace(line), "|"), "|") {
		cells = append(cells, strings.TrimSpace(cell))
	}
	return cells
}

// TestPagesNameSettingsThatExist checks the settings that the README and the operators' page show in tables against the
// page that is generated from the code.
func TestPagesNameSettingsThatExist(t *testing.T) {
	t.Parallel()
	settings, named := page(t, "configuration.md"), 0
	for _, name := range []string{"../README.md", "operations.md"} {
		for line := range strings.Lines(page(t, name)) {
			c := cellsOf(line)
			if len(c) < 2 {
				continue
			}
			for _, found := range quoted.FindAllStringSubmatch(c[0], -1) {
				if setting := found[1]; setting == strings.ToUpper(setting) && !strings.ContainsAny(setting, " /") {
					named++
					if !strings.Contains(settings, "`"+setting+"`") {
						t.Errorf("docs/%s has %s, and no command takes it", name, setting)
					}
				}
			}
		}
	}
	if named < 20 {
		t.Errorf("only %d settings found", named)
	}
}
