package main

import (
	"fmt"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/alecthomas/kong"
)

// limits are what a help text says of the values that are taken: 1 to 1000, or 1 or more.
var limits = regexp.MustCompile(`, ([0-9.]+[a-z]*) (?:to ([0-9.]*[0-9][a-z]*)|or more)\b`)

// arguments are what each command needs besides the flag in question.
var arguments = map[string]string{"redrive": "--reason=x --all", "discard": "--reason=x --all", "call": "a.B/C"}

// What a help text says of limits is what is checked: the limits themselves are taken, and what is just outside is not.
func TestLimitsAreThoseOfTheHelp(t *testing.T) {
	for _, name := range []string{"POSTGRES_URL", "AMQP_URL", "INSECURE_NO_AUTH"} {
		t.Setenv(name, map[string]string{"POSTGRES_URL": "postgres://h/d", "AMQP_URL": "amqp://h/", "INSECURE_NO_AUTH": "true"}[name])
	}
	found := 0
	for _, leaf := range newParser(new(cli)).Model.Leaves(true) {
		for _, one := range leaf.Flags {
			limit := limits.FindStringSubmatch(one.Help)
			if limit == nil {
				continue
			}
			found++
			try := func(value string, want bool) {
				args := append(strings.Fields(commandOf(leaf)+" "+arguments[leaf.Name]), "--"+one.Name+"="+value)
				_, err := newParser(new(cli)).Parse(args)
				if (err == nil) != want {
					t.Errorf("%v: taken is %v, and the help says: %s (%v)", args, err == nil, one.Help, err)
				}
			}
			low, below := limit[1], beside(t, one.Value, limit[1], -1)
			try(low, true)
			try(below, false)
			if high := limit[2]; high != "" {
				try(high, true)
				try(beside(t, one.Value, high, 1), false)
			}
		}
	}
	if found < 15 {
		t.Errorf("only %d limits found", found)
	}
}

// beside is the value next to a limit, on one side of it.
func beside(t *testing.T, v *kong.Value, limit string, side int) string {
	t.Helper()
	var err error
	var text string
	switch v.Target.Interface().(type) {
	case time.Duration:
		var d time.Duration
		d, err = time.ParseDuration(limit)
		text = (d + time.Duration(side)).String()
	case float64:
		var f float64
		f, err = strconv.ParseFloat(limit, 64)
		text = fmt.Sprint(f + float64(side)*0.005)
	default:
		var n int
		n, err = strconv.Atoi(limit)
		text = strconv.Itoa(n + side)
	}
	if err != nil {
		t.Fatalf("--%s: %v", v.Name, err)
	}
	return text
}
