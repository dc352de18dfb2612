package main

import (
	"errors"
	"fmt"
	"go/token"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"golang.org/x/mod/modfile"
	"golang.org/x/mod/module"
)

// serviceShape matches names that can be a Go package, a protobuf package, a database, a container and a Kubernetes
// object.
var serviceShape = regexp.MustCompile(`^[a-z][a-z0-9]{1,29}$`)

// reserved are names that already mean something where the service's name is used. Commands and packages of the
// template are not listed, because checkService finds them in the template's tree.
var reserved = map[string]string{
	"template0": "a database of Postgres", "template1": "a database of Postgres", "postgres": "a database of Postgres",
	"rabbitmq": "a service of docker-compose.yml",
	"internal": "a folder that Go gives a meaning", "testdata": "a folder that Go gives a meaning",
	"vendor": "a folder that Go gives a meaning",
	"test":   "a target of make and a command of Go", "buf": "a folder of proto/", "google": "a protobuf package",
	"bench": "a folder of the template", "conformance": "a folder of the template", "tools": "a folder of the template",
	"web": "a folder of the template", "migrations": "a package of the template",
	"load": "an image of the template", "api": "a process of the service", "relay": "a process of the service",
	"consumer": "a process of the service",
	"true":     "a value in YAML", "false": "a value in YAML", "yes": "a value in YAML", "no": "a value in YAML",
	"on": "a value in YAML", "off": "a value in YAML", "null": "a value in YAML",
}

// sqlWords are words that Postgres accepts as a database's name only in quotes.
var sqlWords = strings.Fields(`all analyse analyze and any array as asc asymmetric both case cast check collate column
	constraint create cross current default deferrable desc distinct do else end except false fetch for foreign freeze
	from full grant group having in initially inner intersect into is isnull join lateral leading left like limit
	localtime localtimestamp natural not notnull null offset on only or order outer overlaps placing primary references
	returning right select similar some symmetric table then to trailing true union unique user using variadic verbose
	when where window with`)

func (o *options) check() error {
	if err := module.CheckPath(o.module); err != nil {
		return fmt.Errorf("-module: %w", err)
	}
	if err := o.findTemplate(); err != nil {
		return err
	}
	if err := o.checkService(); err != nil {
		return fmt.Errorf("-service: %w", err)
	}
	return o.checkFolder()
}

// findTemplate finds the checkout in which this program was called.
func (o *options) findTemplate() error {
	top, err := exec.Command("git", "rev-parse", "--show-toplevel").Output()
	o.template = strings.TrimSuffix(string(top), "\n")
	if err == nil {
		_, err = os.Stat(filepath.Join(o.template, "cmd", "new", "main.go"))
	}
	var text []byte
	if err == nil {
		text, err = os.ReadFile(filepath.Join(o.template, "go.mod"))
	}
	if err != nil {
		return errors.New("this is not a git checkout of the template: clone the template, and call this program there")
	}
	o.oldModule = modfile.ModulePath(text)
	return nil
}

func (o *options) checkService() error {
	name := o.service
	if !serviceShape.MatchString(name) {
		return fmt.Errorf("%q must be 2 to 30 lower-case letters and digits, and begin with a letter", name)
	}
	switch {
	case token.IsKeyword(name):
		return fmt.Errorf("%q is a Go keyword", name)
	case slices.Contains(sqlWords, name):
		return fmt.Errorf("%q is an SQL keyword", name)
	case reserved[name] != "":
		return fmt.Errorf("%q is %s", name, reserved[name])
	case name == templateService:
		return nil
	}
	for _, folder := range []string{"cmd", "internal", "proto"} {
		if _, err := os.Stat(filepath.Join(o.template, folder, name)); err == nil {
			return fmt.Errorf("%q is %s/%s of the template", name, folder, name)
		}
	}
	return nil
}

func (o *options) checkFolder() (err error) {
	if o.folder, err = filepath.Abs(o.folder); err != nil {
		return err
	}
	if _, err := os.Lstat(o.folder); err == nil {
		return fmt.Errorf("%s already exists", o.folder)
	}
	parent, err := filepath.EvalSymlinks(filepath.Dir(o.folder))
	if err != nil {
		return fmt.Errorf("%s: its parent folder does not exist", o.folder)
	}
	if info, err := os.Stat(parent); err != nil || !info.IsDir() {
		return fmt.Errorf("%s is not a folder", parent)
	}
	if parent == o.template || strings.HasPrefix(parent, o.template+string(filepath.Separator)) {
		return fmt.Errorf("%s is inside the template", o.folder)
	}
	return nil
}
