package main

import (
	"encoding/json"
	"fmt"
	"net/url"
	"strings"
	"testing"

	"example.com/shop/internal/app"
	"example.com/shop/internal/dev/testenv"
	"example.com/shop/internal/rabbit"
	"github.com/google/go-cmp/cmp"
)

// The command prints the permissions that internal/app's tests run the processes with, as text and as JSON.
func TestTopologyNamesThePermissions(t *testing.T) {
	t.Parallel()
	want, err := app.Permissions("events")
	if err != nil {
		t.Fatal(err)
	}
	if len(want) < 2 {
		t.Fatalf("permissions of %d users", len(want))
	}
	status, stdout, stderr := callProgram(t, shipped(), nil, "topology")
	if status != 0 {
		t.Fatal(stderr)
	}
	for user, p := range want {
		line := fmt.Sprintf("%s '%s' '%s' '%s'", user, p.Configure, p.Write, p.Read)
		if !strings.Contains(collapse(stdout), line) {
			t.Errorf("%q is not in\n%s", line, stdout)
		}
	}
	if topics := want["relay"].Topics; topics != nil { // a service without a domain may publish nothing
		line := fmt.Sprintf("relay '%s' '%s' '%s'", topics.Exchange, topics.Write, topics.Read)
		if !strings.Contains(collapse(stdout), line) {
			t.Errorf("%q is not in\n%s", line, stdout)
		}
	}
	_, stdout, _ = callProgram(t, shipped(), nil, "topology", "--json")
	var got struct{ Permissions map[string]rabbit.Permissions }
	if err := json.Unmarshal([]byte(stdout), &got); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got.Permissions); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}

// collapse replaces whitespace by single spaces.
func collapse(text string) string { return strings.Join(strings.Fields(text), " ") }

// The users that the program creates have the permissions that it prints, and any text works as their password.
func TestTopologyMakesUsers(t *testing.T) {
	t.Parallel()
	admin := testenv.AMQP(t)
	broker, prefix := testenv.Management(t, admin), admin[strings.LastIndexByte(admin, '/')+1:]
	const password = "p@ss/+ %=:"
	environment := []string{
		"AMQP_URL=" + admin, "RABBITMQ_MANAGEMENT_URL=" + broker.URL(), "AMQP_USERS_PASSWORD=" + password,
	}
	for range 2 { // repeating it is no error
		status, _, stderr := callProgram(t, binary(), environment, "topology", "--declare", "--users="+prefix)
		if status != 0 {
			t.Fatal(stderr)
		}
	}
	got, want := broker.Users(prefix+"-"), map[string][3]string{}
	_, stdout, _ := callProgram(t, binary(), nil, "topology", "--json")
	var printed struct{ Permissions map[string]rabbit.Permissions }
	if err := json.Unmarshal([]byte(stdout), &printed); err != nil {
		t.Fatal(err)
	}
	for process, p := range printed.Permissions {
		want[process] = [3]string{p.Configure, p.Write, p.Read}
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	bare, err := url.Parse(admin)
	if err != nil {
		t.Fatal(err)
	}
	bare.User = url.User(prefix + "-relay")
	// With the right password, the user logs in, and may not declare.
	for given, want := range map[string]string{password: "refused for user", "another": "not allowed"} {
		environment := []string{"AMQP_URL=" + bare.String(), "AMQP_PASSWORD=" + given}
		status, _, stderr := callProgram(t, binary(), environment, "topology", "--declare")
		if status != 1 || !strings.Contains(stderr, want) || strings.Contains(stderr, given) {
			t.Errorf("with %q: status %d, want %q: %s", given, status, want, stderr)
		}
	}
}
