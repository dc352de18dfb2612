package main

import (
	"fmt"
	"path"
	"regexp"
	"strings"
)

// mark matches a mark, which is a comment in the file's own syntax (#, //, -- or <!-- -->). Lines between "# example"
// and "# /example" belong to the example, and lines between "# template" and "# /template" to the template, in files
// that otherwise stay.
var mark = regexp.MustCompile(`^\s*(?:#|//|--|<!--) (/?)(example|template)(?: -->)?$`)

// unmarked removes the marks and the lines between them that the new tree does not get.
func (o *options) unmarked(text string) (string, error) {
	var kept strings.Builder
	open := ""
	for line := range strings.Lines(text) {
		found := mark.FindStringSubmatch(strings.TrimRight(line, "\n"))
		switch {
		case found == nil:
			if open == "" || open == "example" && !o.bare {
				kept.WriteString(line)
			}
		case found[1] == "" && open == "":
			open = found[2]
		case found[1] == "/" && open == found[2]:
			open = ""
		default:
			return "", fmt.Errorf("the mark %q is unexpected here", strings.TrimSpace(line))
		}
	}
	if open != "" {
		return "", fmt.Errorf("the mark %s is not closed", open)
	}
	return kept.String(), nil
}

var (
	linkIn       = regexp.MustCompile(`\]\(([^)#:]+)`)
	exampleTests = regexp.MustCompile("(?:, `orders\\.Test\\w+`)+ \\|\n")
)

// withoutRows removes rows from a page's tables, where no mark can be: rows that link to omitted files, and rows and
// tests that only the example needs.
func (o *options) withoutRows(name, text string) string {
	var kept strings.Builder
	for line := range strings.Lines(text) {
		if strings.HasPrefix(line, "| ") {
			found := linkIn.FindStringSubmatch(line)
			if found != nil && o.omitted(path.Join(path.Dir(name), found[1])) {
				continue
			}
			if o.bare {
				line = exampleTests.ReplaceAllString(line, " |\n")
				if strings.Contains(line, "`orders.Service") {
					continue
				}
			}
		}
		kept.WriteString(line)
	}
	return kept.String()
}
