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

var update = flag.Bool("update", false, "rewrite docs/configuration.md")

// processes returns the commands that run until they are stopped: those that answer probes.
func processes() (names []string) {
	for _, leaf := range newParser(new(cli)).Model.Leaves(true) {
		answers := func(f *kong.Flag) bool { return slices.Contains(f.Envs, "OPS_LISTEN") }
		if slices.ContainsFunc(leaf.Flags, answers) {
			names = append(names, commandOf(leaf))
		}
	}
	return names
}

// configurationHead is the beginning of the page, with quotation marks for backquotes.
var configurationHead = strings.ReplaceAll(`# Configuration

Every setting is a flag, and most are also environment variables; a flag takes precedence. For a wrong value the command
prints one line that names it, and exits with status 2 before it does anything. "shop COMMAND --help" prints the same
texts.

This page is generated from the code: "make docs" writes it, and a test fails while it is out of date.

The URLs of Postgres and RabbitMQ configure TLS ([security](security.md#tls)). libpq's own variables ("PGHOST",
"PGPASSWORD", …) provide what a Postgres URL omits. "AMQP_PASSWORD" provides the password if "AMQP_URL" or
"RABBITMQ_MANAGEMENT_URL" names a user without one. Both variables contain a password as plain text; a URL contains it
percent-encoded. Processes export traces if "OTEL_EXPORTER_OTLP_ENDPOINT" names a collector; OpenTelemetry's other
variables work as it defines them ([metrics](metrics.md#traces)).
`, `"`, "`")

// docs/configuration.md describes the flags of this program.
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
		t.Errorf("docs/configuration.md is out of date (%v): run make docs", err)
	}
}

// setting is an environment variable with the flag of each command that uses it.
type setting struct {
	commands []string
	flags    []*kong.Flag
}

func configurationPage(t *testing.T) string {
	t.Helper()
	var out strings.Builder
	out.WriteString(configurationHead)
	model := newParser(new(cli)).Model
	writeSettings(t, &out, model)
	out.WriteString("\n## Commands\n\nArguments and flags without a variable; commands without any are not listed. " +
		"`[…]` is optional, `…` may be repeated.\n")
	for _, leaf := range model.Leaves(true) {
		writeCommand(&out, leaf)
	}
	return out.String()
}

// writeSettings writes each setting into the first section that it belongs to.
func writeSettings(t *testing.T, out *strings.Builder, model *kong.Application) {
	settings := settingsOf(model)
	isKey := func(s *setting) bool { return s.usual().Envs[0] == "API_KEYS" }
	edge := settings[slices.IndexFunc(settings, isKey)].processes()
	total, listed := len(settings), 0
	for _, section := range []struct {
		title string
		has   func(ofProcesses []string) bool
	}{
		{"Servers and shared settings", func(p []string) bool { return len(p) > 2 && !slices.Equal(p, edge) }},
		{"Access and limits", func(p []string) bool { return slices.Equal(p, edge) }},
		{"API", func(p []string) bool { return slices.Contains(p, "api") }},
		{"Relay", func(p []string) bool { return slices.Contains(p, "relay") }},
		{"Consumer", func(p []string) bool { return slices.Contains(p, "consumer") }},
		{"All in one process", func(p []string) bool { return slices.Contains(p, "all") }},
		{"Other commands", func(p []string) bool { return len(p) == 0 }},
	} {
		isHere := func(s *setting) bool { return section.has(s.processes()) }
		if !slices.ContainsFunc(settings, isHere) {
			continue
		}
		fmt.Fprintf(out, "\n## %s\n\n", section.title)
		out.WriteString("| Variable | Flag | Default | Value | Meaning | Used by |\n|---|---|---|---|---|---|\n")
		settings = slices.DeleteFunc(settings, func(s *setting) bool {
			if !isHere(s) {
				return false
			}
			listed++
			usual := s.usual()
			fmt.Fprintf(out, "| `%s` | `--%s` | %s | %s | %s | %s |\n", usual.Envs[0], usual.Name,
				s.defaultText(), valueText(usual.Value), meaning(usual.Help), s.commandsText(model))
			return true
		})
	}
	if listed != total {
		t.Errorf("%d of %d settings are in a section", listed, total)
	}
}

// settingsOf returns the settings with an environment variable, in the order of the commands and their flags.
func settingsOf(model *kong.Application) (all []*setting) {
	add := func(command string, flags []*kong.Flag) {
		for _, f := range flags {
			if len(f.Envs) == 0 {
				continue
			}
			at := slices.IndexFunc(all, func(known *setting) bool { return known.flags[0].Envs[0] == f.Envs[0] })
			if at < 0 {
				all, at = append(all, new(setting)), len(all)
			}
			all[at].commands, all[at].flags = append(all[at].commands, command), append(all[at].flags, f)
		}
	}
	for _, leaf := range model.Leaves(true) {
		add(commandOf(leaf), append(slices.Clone(model.Flags), leaf.Flags...))
	}
	return all
}

// commandOf returns a command's words without the program's name.
func commandOf(leaf *kong.Node) string {
	if leaf.Parent.DefaultCmd == leaf { // users omit a default command
		leaf = leaf.Parent
	}
	_, words, _ := strings.Cut(leaf.FullPath(), " ")
	return words
}

// processes returns the processes that use the setting.
func (s *setting) processes() []string {
	all := processes()
	isOther := func(command string) bool { return !slices.Contains(all, command) }
	return slices.DeleteFunc(slices.Clone(s.commands), isOther)
}

// usual returns the flag with the most common help text.
func (s *setting) usual() *kong.Flag {
	times := map[string]int{}
	for _, f := range s.flags {
		times[f.Help]++
	}
	return slices.MaxFunc(s.flags, func(a, b *kong.Flag) int { return cmp.Compare(times[a.Help], times[b.Help]) })
}

// defaultText returns the default, or that of each command if they differ, or which commands require the setting.
func (s *setting) defaultText() string {
	var optional, defaults []string
	for i, f := range s.flags {
		if !f.Required {
			optional = append(optional, s.commands[i])
		}
		defaults = append(defaults, s.commands[i]+": "+code(f.Default))
	}
	same := !slices.ContainsFunc(s.flags, func(f *kong.Flag) bool { return f.Default != s.flags[0].Default })
	switch {
	case len(optional) == 0:
		return "required"
	case len(optional) < len(s.flags):
		return "required, except for " + strings.Join(optional, ", ")
	case same:
		return cmp.Or(code(s.flags[0].Default), "–")
	}
	return strings.Join(defaults, ", ")
}

func (s *setting) commandsText(model *kong.Application) string {
	if len(s.commands) == len(model.Leaves(true)) {
		return "every command"
	}
	return "`" + strings.Join(s.commands, "`, `") + "`"
}

// writeCommand writes the arguments and flags without a variable, if the command has any.
func writeCommand(out *strings.Builder, leaf *kong.Node) {
	line, rows := "shop "+commandOf(leaf), ""
	row := func(name string, v *kong.Value) {
		rows += fmt.Sprintf("| `%s` | %s | %s | %s |\n", name, cmp.Or(code(v.Default), "–"), valueText(v),
			meaning(v.Help))
	}
	for _, argument := range leaf.Positional {
		line += " " + strings.ReplaceAll(argument.Summary(), " ...", "…")
		row("<"+argument.Name+">", argument)
	}
	for _, f := range leaf.Flags {
		if len(f.Envs) == 0 {
			row("--"+f.Name, f.Value)
		}
	}
	if rows != "" {
		fmt.Fprintf(out, "\n### shop %s\n\n`%s`: %s\n\n", commandOf(leaf), line, leaf.Help)
		out.WriteString("| Flag | Default | Value | Meaning |\n|---|---|---|---|\n" + rows)
	}
}

func code(text string) string {
	if text == "" {
		return ""
	}
	return "`" + text + "`"
}

// meaning returns a help text without its limits, which are in the column Value.
func meaning(help string) string {
	return strings.ReplaceAll(limits.ReplaceAllString(help, ""), "|", "\\|")
}

// valueText returns the kind of a value, with its limits if the help text states them.
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
		return "SHARD:ID"
	case postgresURL, amqpURL, managementURL:
		return "URL"
	}
	switch {
	case strings.HasSuffix(kind.Name(), "Address"):
		return "HOST:PORT"
	case kind.Kind() == reflect.Bool:
		return "true, false"
	case kind.Kind() == reflect.Pointer || reflect.Zero(kind).CanInt() || reflect.Zero(kind).CanFloat():
		return "number"
	}
	return "text"
}
