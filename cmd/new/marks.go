package main

import (
	"fmt"
	"path"
	"regexp"
	"slices"
	"strings"
)

// mark matches a mark, which is a comment in the file's own syntax (#, //, -- or <!-- -->). Lines between "# example"
// and "# /example" belong to the example, lines between "# template" and "# /template" to the template, and lines
// between "# console" and "# /console" to the feature of that name, in files that otherwise stay. Go files have none.
var mark = regexp.MustCompile(`^\s*(?:#|//|--|<!--) (/?)(example|template|` +
	strings.ReplaceAll(featureNames(), ", ", "|") + `)(?: -->)?$`)

// unmarked removes the marks and the lines between them that the new tree does not get. Marks may be nested.
func (o *options) unmarked(text string) (string, error) {
	var kept strings.Builder
	var open []string
	for line := range strings.Lines(text) {
		found := mark.FindStringSubmatch(strings.TrimRight(line, "\n"))
		switch {
		case found == nil:
			if !slices.ContainsFunc(open, o.omits) {
				kept.WriteString(line)
			}
		case found[1] == "" && !slices.Contains(open, found[2]):
			open = append(open, found[2])
		case found[1] == "/" && len(open) > 0 && open[len(open)-1] == found[2]:
			open = open[:len(open)-1]
		default:
			return "", fmt.Errorf("the mark %q is unexpected here", strings.TrimSpace(line))
		}
	}
	if len(open) > 0 {
		return "", fmt.Errorf("the mark %s is not closed", open[len(open)-1])
	}
	return kept.String(), nil
}

// omits reports whether the new tree does not get the lines between marks.
func (o *options) omits(mark string) bool {
	return mark == "template" || mark == "example" && o.bare || !o.has(mark)
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
			line = o.withoutNames(line)
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
