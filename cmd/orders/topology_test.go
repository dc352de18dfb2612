package main

import (
	"encoding/json"
	"strings"
	"testing"

	"example.com/orders/internal/app"
	"example.com/orders/internal/rabbit"
	"github.com/google/go-cmp/cmp"
)

// What is printed for people and for programs are the permissions that internal/app's tests run the processes with.
func TestTopologyNamesThePermissions(t *testing.T) {
	t.Parallel()
	want := app.Permissions("events")
	if len(want) != 5 {
		t.Fatalf("permissions of %d users", len(want))
	}
	status, stdout, stderr := callProgram(t, shipped(), nil, "topology")
	if status != 0 {
		t.Fatal(stderr)
	}
	for user, p := range want {
		if line := strings.Join([]string{user, "'" + p.Configure + "'", "'" + p.Write + "'", "'" + p.Read + "'"}, " "); !strings.Contains(oneBlank(stdout), line) {
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

func oneBlank(text string) string { return strings.Join(strings.Fields(text), " ") }
