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

// limits matches the limits in a help text: ", 1 to 1000" or ", 1 or more".
var limits = regexp.MustCompile(`, ([0-9.]+[a-z]*) (?:to ([0-9.]*[0-9][a-z]*)|or more)\b`)

// arguments are the arguments that a command requires besides the flag under test.
var arguments = map[string]string{"redrive": "--reason=x --all", "discard": "--reason=x --all", "call": "a.B/C"}

// Each flag accepts the limits that its help text states, and rejects the values just outside of them.
func TestLimitsAreThoseOfTheHelp(t *testing.T) {
	t.Setenv("POSTGRES_URL", "postgres://h/d")
	t.Setenv("AMQP_URL", "amqp://h/")
	t.Setenv("INSECURE_NO_AUTH", "true")
	setRequired(t)
	found := 0
	for _, leaf := range newParser(new(cli)).Model.Leaves(true) {
		for _, f := range leaf.Flags {
			limit := limits.FindStringSubmatch(f.Help)
			if limit == nil {
				continue
			}
			found++
			try := func(value string, want bool) {
				args := append(strings.Fields(commandOf(leaf)+" "+arguments[leaf.Name]), "--"+f.Name+"="+value)
				_, err := newParser(new(cli)).Parse(args)
				if (err == nil) != want {
					t.Errorf("%v: accepted is %v, against the help text: %s (%v)", args, err == nil, f.Help, err)
				}
			}
			low, below := limit[1], beside(t, f.Value, limit[1], -1)
			try(low, true)
			try(below, false)
			if high := limit[2]; high != "" {
				try(high, true)
				try(beside(t, f.Value, high, 1), false)
			}
		}
	}
	if found < 15 {
		t.Errorf("only %d limits found", found)
	}
}

// beside returns the value just below (side is -1) or above (1) a limit.
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
