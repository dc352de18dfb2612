package main

import (
	"cmp"
	"slices"
	"testing"

	"example.com/shop/internal/app"
	"github.com/alecthomas/kong"
)

// domainSettings are the domain's own flags.
func domainSettings() []*kong.Flag {
	flags := kong.Must(&domainFlags{}).Model.Flags
	return slices.DeleteFunc(flags, func(f *kong.Flag) bool { return f.Name == "help" })
}

func isOfDomain(s *setting) bool {
	return slices.ContainsFunc(domainSettings(), func(f *kong.Flag) bool { return slices.Equal(f.Envs, s.flags[0].Envs) })
}

// setRequired sets the settings that the domain requires, so that tests of the core's flags do not depend on them.
func setRequired(t *testing.T) {
	t.Helper()
	for _, f := range domainSettings() {
		if f.Required && len(f.Envs) > 0 {
			t.Setenv(f.Envs[0], cmp.Or(f.Default, "1"))
		}
	}
}

// The processes that serve calls or handle messages have all settings of the domain; no other command needs them.
func TestSettingsOfTheDomain(t *testing.T) {
	t.Parallel()
	for _, s := range settingsOf(newParser(new(cli)).Model) {
		if !isOfDomain(s) {
			continue
		}
		if want := []string{"all", "api", "consumer"}; !slices.Equal(slices.Sorted(slices.Values(s.commands)), want) {
			t.Errorf("%s is a setting of %q, want %q", s.flags[0].Envs[0], s.commands, want)
		}
	}
	var config app.Config
	if err := new(domainFlags).apply(&config); config.Domain == nil {
		t.Errorf("the process does not get its settings (%v)", err)
	}
}
