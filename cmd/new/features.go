package main

import (
	"fmt"
	"path"
	"regexp"
	"slices"
	"strings"
)

// feature is a part of the core that a service can be made without.
type feature struct {
	// name names the feature on the command line, and in the marks around parts of files that belong to it.
	name string
	// word occurs in each line of a file features.go that belongs to the feature.
	word *regexp.Regexp
	// row matches the first cell of rows about the feature in the tables of pages, where no mark can be.
	row *regexp.Regexp
	// files are patterns for the feature's files, as for path.Match, or folders with a slash at the end.
	files []string
}

func pattern(text string) *regexp.Regexp { return regexp.MustCompile("(?i)" + text) }

var features = []feature{
	{"console", pattern(`console`), pattern(`console`), []string{
		"internal/console/", "web/console/", "proto/ops/", "docs/console.md", "docs/images/", "scripts/console.sh",
		"deploy/kubernetes/base/console.yaml", "cmd/shop/console*.go", "internal/app/*console*.go",
		"internal/app/browser_test.go", "internal/dev/architecture/console_test.go",
	}},
	{"durable-calls", pattern(`durablecall`), pattern(`durable call|CALL_(KEYS|CON|LIM)`), []string{
		"internal/operations/", "proto/shop/operations/", "proto/ops/v1/operations.proto", "docs/durable-calls.md",
		"migrations/core/0004_operations.sql", "migrations/operations_test.go", "cmd/shop/calls*.go",
		"internal/app/calls*.go", "internal/console/operations*.go", "internal/ops/operations_test.go",
		"internal/dev/architecture/calls_test.go", "internal/dev/chaos/calls_test.go", "internal/dev/chaos/victim/calls.go",
		"tools/composecheck/calls.go",
		"web/console/src/operations.ts",
	}},
	{"rpc-over-rabbitmq", pattern(`overrabbitmq`), pattern(`over rabbitmq|RPC_(OVER|PREFETCH)|rpc ls`), []string{
		"internal/rabbitrpc/", "docs/rpc-over-rabbitmq.md", "cmd/shop/rpc_rabbitmq*.go", "internal/app/rpc*.go",
		"conformance/bridge.go", "conformance/queue*", "internal/dev/architecture/rpc_test.go",
	}},
}

// isOf reports whether a file belongs to the feature.
func (f feature) isOf(name string) bool {
	return slices.ContainsFunc(f.files, func(pattern string) bool {
		matched, _ := path.Match(pattern, name)
		return matched || strings.HasSuffix(pattern, "/") && strings.HasPrefix(name, pattern)
	})
}

// has reports whether the new tree has the feature with this name.
func (o *options) has(name string) bool { return !slices.Contains(o.without, name) }

// left returns the features that the new tree does not get.
func (o *options) left() []feature {
	return slices.DeleteFunc(slices.Clone(features), func(f feature) bool { return o.has(f.name) })
}

// setWithout parses the value of -without.
func (o *options) setWithout(list string) error {
	for name := range strings.SplitSeq(list, ",") {
		if !slices.ContainsFunc(features, func(f feature) bool { return f.name == name }) {
			return fmt.Errorf("-without: %q is none of %s", name, featureNames())
		}
		o.without = append(o.without, name)
	}
	return nil
}

func featureNames() string {
	var names []string
	for _, f := range features {
		names = append(names, f.name)
	}
	return strings.Join(names, ", ")
}

// withoutLines removes the lines of a file features.go that belong to features that the new tree does not get.
func (o *options) withoutLines(text string) string {
	for _, f := range o.left() {
		var kept strings.Builder
		for line := range strings.Lines(text) {
			if !f.word.MatchString(line) {
				kept.WriteString(line)
			}
		}
		text = kept.String()
	}
	return text
}

// withoutNames removes what a row of a table says about features that the new tree does not get: names of their
// packages. It returns "" if the row is about such a feature, or if nothing is left of a cell.
func (o *options) withoutNames(row string) string {
	cells := strings.Split(row, "|")
	for _, f := range o.left() {
		if f.row.MatchString(cells[1]) {
			return ""
		}
		for _, file := range f.files {
			pkg, isPackage := strings.CutPrefix(strings.TrimSuffix(file, "/"), "internal/")
			if !isPackage || file == pkg || strings.Contains(pkg, "/") || !strings.HasSuffix(file, "/") {
				continue
			}
			name := regexp.MustCompile("(?:, )?`" + pkg + "\\.\\w[\\w.]*`")
			for i, cell := range cells {
				if name.MatchString(cell) {
					cells[i] = strings.TrimPrefix(strings.TrimSpace(name.ReplaceAllString(cell, "")), ", ")
					if cells[i] == "" {
						return ""
					}
					cells[i] = " " + cells[i] + " "
				}
			}
		}
	}
	return strings.Join(cells, "|")
}
