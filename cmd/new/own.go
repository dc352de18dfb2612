package main

import (
	_ "embed"
	"fmt"
	"path"
	"strings"
	"text/template"
)

// These are the new tree's own versions of files.
var (
	//go:embed own/README.md.tmpl
	readme string
	//go:embed own/domain.go.txt
	bareDomain string
	//go:embed own/CHANGELOG.md
	changelog string
)

// rewritten returns the text of a file in the new tree, before names are replaced.
func (o *options) rewritten(name, text string) (string, error) {
	switch {
	case verbatim(name), strings.HasPrefix(name, coreMigrations):
		return text, nil
	case name == "README.md":
		return o.readme(text)
	case name == "CHANGELOG.md":
		return changelog, nil
	case name == "internal/app/domain.go" && o.bare:
		return bareDomain, nil
	}
	if o.bare && name == measured {
		text = strings.Replace(text, "\n\n", "\n\nMeasured with the template that this service was made from; run its "+
			"`make bench` to measure again.\n\n", 1)
	}
	if path.Base(name) == "features.go" {
		return o.withoutLines(text), nil
	}
	text, err := o.unmarked(text)
	if path.Ext(name) == ".md" {
		text = o.withoutRows(name, text)
	}
	return text, err
}

// readme returns the new tree's own README, with the sections of the template's README that are true for every service.
func (o *options) readme(templates string) (string, error) {
	page, err := template.New("README.md").Funcs(template.FuncMap{"section": func(title string) (string, error) {
		_, rest, found := strings.Cut(templates, "\n## "+title+"\n")
		if !found {
			return "", fmt.Errorf("the template has no section %q", title)
		}
		body, _, _ := strings.Cut(rest, "\n## ")
		return "## " + title + "\n\n" + strings.TrimSpace(body), nil
	}}).Parse(readme)
	if err != nil {
		return "", err
	}
	domain := "orders"
	if o.bare {
		domain = "invoices" // the domain of the guide
	}
	var text strings.Builder
	if err := page.Execute(&text, map[string]any{"Bare": o.bare, "Domain": domain}); err != nil {
		return "", err
	}
	return o.unmarked(text.String())
}
