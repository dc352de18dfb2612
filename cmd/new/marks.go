package main

import (
	"fmt"
	"path"
	"regexp"
	"strings"
)

// In files that stay, lines between "# example" and "# /example" go with the example, and lines between "# template"
// and "# /template" with the template. The comment is the file's own: # or // or -- or <!-- -->.
var mark = regexp.MustCompile(`^\s*(?:#|//|--|<!--) (/?)(example|template)(?: -->)?$`)

// unmarked leaves the marks out, and with them what is not wanted.
func (o *order) unmarked(text string) (string, error) {
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
			return "", fmt.Errorf("the mark %q does not fit where it stands", strings.TrimSpace(line))
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

// tabled leaves out rows of a page's tables, between which no mark can stand: those that lead to what is left behind,
// and those that only the example keeps.
func (o *order) tabled(name, text string) string {
	var kept strings.Builder
	for line := range strings.Lines(text) {
		if strings.HasPrefix(line, "| ") {
			found := linkIn.FindStringSubmatch(line)
			if found != nil && o.leftBehind(path.Join(path.Dir(name), found[1])) {
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
