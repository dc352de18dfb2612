package main

import (
	"cmp"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/alecthomas/kong"
)

var update = flag.Bool("update", false, "write docs/configuration.md anew")

// processes are the commands that run for ever.
var processes = []string{"api", "relay", "consumer", "console", "all"}

const configurationHead = `# Configuration

Every setting is a flag, and most are environment variables, too; a flag counts more. ` + "`shop COMMAND --help`" + ` shows the same. A wrong
value is one line that names it, and exit status 2, before anything is done.

This page is made from the code: ` + "`make docs`" + ` writes it, and a test fails while it is not current.

TLS to Postgres and RabbitMQ is set up in their URLs ([security](security.md#tls)). What a Postgres URL leaves open, libpq's own variables
(` + "`PGHOST`, `PGPASSWORD`, …" + `) say. A user without a password in
` + "`AMQP_URL` or `RABBITMQ_MANAGEMENT_URL`" + ` has the one in ` + "`AMQP_PASSWORD`" + `. Both variables take any text as it is; in a URL a password is
percent-encoded. Traces are exported if ` + "`OTEL_EXPORTER_OTLP_ENDPOINT`" + ` names a collector; OpenTelemetry's other
variables work as it defines them ([metrics](metrics.md#traces)).
`

// The page says what the code does.
func TestConfigurationPage(t *testing.T) {
	t.Parallel()
	const name = "../../docs/configuration.md"
	want := configurationPage(t)
	if *update {
		if err := os.WriteFile(filepath.FromSlash(name), []byte(want), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	got, err := os.ReadFile(filepath.FromSlash(name))
	if err != nil || string(got) != want {
		t.Errorf("docs/configuration.md is not current (%v): make docs writes it", err)
	}
}

// setting is one environment variable, as each of the commands has it that take it.
type setting struct {
	takers []string
	flags  []*kong.Flag
}

func configurationPage(t *testing.T) string {
	t.Helper()
	edge := []string{"api", "console", "all"}
	var out strings.Builder
	out.WriteString(configurationHead)
	model := newParser(new(cli)).Model
	settings := settingsOf(model)
	listed := 0
	for _, section := range []struct {
		title string
		has   func(ofProcesses []string) bool
	}{
		{"Servers, and what several processes have in common", func(p []string) bool { return len(p) > 2 && !slices.Equal(p, edge) }},
		{"Who may call API and console, and what that may cost", func(p []string) bool { return slices.Equal(p, edge) }},
		{"API", func(p []string) bool { return slices.Equal(p, []string{"api", "all"}) }},
		{"Relay", func(p []string) bool { return slices.Equal(p, []string{"relay", "all"}) }},
		{"Consumer", func(p []string) bool { return slices.Equal(p, []string{"consumer", "all"}) }},
		{"Console", func(p []string) bool {
			return slices.Equal(p, []string{"all"}) || slices.Equal(p, []string{"console", "all"})
		}},
		{"Other commands", func(p []string) bool { return len(p) == 0 }},
	} {
		fmt.Fprintf(&out, "\n## %s\n\n| Variable | Flag | Default | Value | Meaning | Taken by |\n|---|---|---|---|---|---|\n", section.title)
		for _, one := range settings {
			if section.has(slices.DeleteFunc(slices.Clone(one.takers), func(taker string) bool { return !slices.Contains(processes, taker) })) {
				listed++
				usual := one.usual()
				fmt.Fprintf(&out, "| `%s` | `--%s` | %s | %s | %s | %s |\n",
					usual.Envs[0], usual.Name, one.defaultText(), valueText(usual.Value), meaning(usual.Help), one.takersText(model))
			}
		}
	}
	if listed != len(settings) {
		t.Errorf("%d of %d settings are in a section", listed, len(settings))
	}
	out.WriteString("\n## Commands\n\nWhat they take besides the variables above; a command that is not here takes nothing. `[…]` may be left out, `…` repeated.\n")
	for _, leaf := range model.Leaves(true) {
		writeCommand(&out, leaf)
	}
	return out.String()
}

// settingsOf returns the settings with an environment variable, in the order in which the commands have them.
func settingsOf(model *kong.Application) (all []*setting) {
	add := func(taker string, flags []*kong.Flag) {
		for _, one := range flags {
			if len(one.Envs) == 0 {
				continue
			}
			at := slices.IndexFunc(all, func(known *setting) bool { return known.flags[0].Envs[0] == one.Envs[0] })
			if at < 0 {
				all, at = append(all, new(setting)), len(all)
			}
			all[at].takers, all[at].flags = append(all[at].takers, taker), append(all[at].flags, one)
		}
	}
	for _, leaf := range model.Leaves(true) {
		add(commandOf(leaf), append(slices.Clone(model.Flags), leaf.Flags...))
	}
	return all
}

// commandOf is a command's words without the program's name.
func commandOf(leaf *kong.Node) string {
	if leaf.Parent.DefaultCmd == leaf { // what a command does if none of its own is given
		leaf = leaf.Parent
	}
	_, words, _ := strings.Cut(leaf.FullPath(), " ")
	return words
}

// usual is the setting as most commands describe it.
func (s *setting) usual() *kong.Flag {
	times := map[string]int{}
	for _, one := range s.flags {
		times[one.Help]++
	}
	return slices.MaxFunc(s.flags, func(a, b *kong.Flag) int { return cmp.Compare(times[a.Help], times[b.Help]) })
}

// defaultText is the default, or that of each command if they differ, or who must have the setting.
func (s *setting) defaultText() string {
	var optional, defaults []string
	for i, one := range s.flags {
		if !one.Required {
			optional = append(optional, s.takers[i])
		}
		defaults = append(defaults, s.takers[i]+": "+code(one.Default))
	}
	same := !slices.ContainsFunc(s.flags, func(one *kong.Flag) bool { return one.Default != s.flags[0].Default })
	switch {
	case len(optional) == 0:
		return "required"
	case len(optional) < len(s.flags):
		return "required, but not for " + strings.Join(optional, ", ")
	case same:
		return cmp.Or(code(s.flags[0].Default), "–")
	}
	return strings.Join(defaults, ", ")
}

func (s *setting) takersText(model *kong.Application) string {
	if len(s.takers) == len(model.Leaves(true)) {
		return "every command"
	}
	return "`" + strings.Join(s.takers, "`, `") + "`"
}

// writeCommand writes what a command takes besides variables, if it takes anything.
func writeCommand(out *strings.Builder, leaf *kong.Node) {
	line, rows := "shop "+commandOf(leaf), ""
	for _, one := range leaf.Positional {
		line += " " + strings.ReplaceAll(one.Summary(), " ...", "…")
		rows += fmt.Sprintf("| `<%s>` | %s | %s | %s |\n", one.Name, cmp.Or(code(one.Default), "–"), valueText(one), meaning(one.Help))
	}
	for _, one := range leaf.Flags {
		if len(one.Envs) == 0 {
			rows += fmt.Sprintf("| `--%s` | %s | %s | %s |\n", one.Name, cmp.Or(code(one.Default), "–"), valueText(one.Value), meaning(one.Help))
		}
	}
	if rows != "" {
		fmt.Fprintf(out, "\n### shop %s\n\n`%s`: %s\n\n| Flag | Default | Value | Meaning |\n|---|---|---|---|\n%s", commandOf(leaf), line, leaf.Help, rows)
	}
}

func code(text string) string {
	if text == "" {
		return ""
	}
	return "`" + text + "`"
}

// meaning is a help text without the limits, which have a column of their own.
func meaning(help string) string {
	return strings.ReplaceAll(limits.ReplaceAllString(help, ""), "|", "\\|")
}

// valueText says what a value looks like, and its limits if the help text has them.
func valueText(v *kong.Value) string {
	text := kindText(v)
	if found := limits.FindStringSubmatch(v.Help); found != nil {
		text += strings.TrimSuffix(found[0], " or more")
		if found[2] == "" {
			text += " or more"
		}
	}
	return text
}

func kindText(v *kong.Value) string {
	kind := v.Target.Type()
	switch {
	case v.Enum != "":
		return strings.Join(v.EnumSlice(), ", ")
	case kind == reflect.TypeFor[map[string]string](), kind == reflect.TypeFor[map[string]int]():
		return "pairs, NAME=VALUE"
	case kind == reflect.TypeFor[[]byte]():
		return "file"
	case kind.Kind() == reflect.Slice:
		return "list"
	}
	switch v.Target.Interface().(type) {
	case slog.Level:
		return "level"
	case time.Duration:
		return "duration"
	case moment:
		return "time"
	case place:
		return "place"
	case postgresURL, amqpURL, managementURL:
		return "URL"
	case listenAddress, optionalAddress:
		return "HOST:PORT"
	}
	switch {
	case kind.Kind() == reflect.Bool:
		return "true, false"
	case kind.Kind() == reflect.Pointer || reflect.Zero(kind).CanInt() || reflect.Zero(kind).CanFloat():
		return "number"
	}
	return "text"
}
