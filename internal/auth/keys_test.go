package auth

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect/v2"
)

func newKey(t *testing.T, id string, roles ...string) (key, line string) {
	t.Helper()
	key, line, err := NewKey(id, roles)
	if err != nil {
		t.Fatal(err)
	}
	return key, line
}

func TestKeys(t *testing.T) {
	t.Parallel()
	ann, annLine := newKey(t, "ann", "customer", "operator")
	bob, bobLine := newKey(t, "bob", "customer")
	annNew, annNewLine := newKey(t, "ann", "customer")
	if strings.Contains(annLine, ann[len("ann."):]) {
		t.Errorf("line %s contains the key %s", annLine, ann)
	}
	keys, err := ParseKeys(strings.Join([]string{annLine, bobLine, annNewLine}, " "))
	if err != nil {
		t.Fatal(err)
	}
	for key, want := range map[string]Caller{
		ann:    {Subject: "ann", Roles: []string{"customer", "operator"}},
		annNew: {Subject: "ann", Roles: []string{"customer"}}, // both keys of ann are valid
		bob:    {Subject: "bob", Roles: []string{"customer"}},
	} {
		caller, err := keys.verify(key)
		if err != nil || caller.Subject != want.Subject || !slices.Equal(caller.Roles, want.Roles) ||
			caller.By != "apikey" {
			t.Errorf("%s: got %+v, %v", key, caller, err)
		}
	}
	hash := annLine[strings.LastIndex(annLine, ":")+1:]
	for _, wrong := range []string{
		"", ".", "ann", "ann.", ann[:len(ann)-1], ann + "x", strings.ToLower(ann), " " + ann, "bob." +
			ann[len("ann."):],
		hash, "ann." + hash, annLine, strings.Repeat("a", 1<<20), "eve." + ann[len("ann."):], "\x00",
	} {
		if caller, err := keys.verify(wrong); connect.CodeOf(err) != connect.CodeUnauthenticated ||
			caller.Subject != "" {
			t.Errorf("%.80q: got %+v, %v", wrong, caller, err)
		}
	}
	if _, err := (*Keys)(nil).verify(ann); err == nil {
		t.Error("nil Keys accepted a key")
	}
}

func TestMalformedKeysAreRefusedAndNotQuoted(t *testing.T) {
	t.Parallel()
	hash := strings.Repeat("0", 64)
	for _, line := range []string{
		"", "# only a comment", "hunter2", "hunter2:customer", "hunter2:customer:" + hash[1:],
		"hunter2:customer:" + hash + "00", "hunter2:customer:" + strings.Repeat("x", 64), "hunter2::" + hash,
		"hunter2:a,,b:" + hash, "hun.ter2:customer:" + hash, ":customer:" + hash, "hunter2:customer:" + hash + ":x",
		"hunter2:cust omer:" + hash,
	} {
		_, err := parseKeys(line)
		if err == nil || strings.Contains(err.Error(), "hunter2") {
			t.Errorf("%q: got error %v", line, err)
		}
	}
	for _, bad := range [][]string{
		{""}, {"ann"}, {"ann", ""}, {"a.b", "customer"}, {"a:b", "customer"}, {"ann", "a,b"}, {"ann\n", "customer"},
	} {
		if _, line, err := NewKey(bad[0], bad[1:]); err == nil && len(bad) > 1 {
			t.Errorf("%q: got %s", bad, line)
		}
	}
}

func TestKeysFollowTheirFile(t *testing.T) {
	t.Parallel()
	old, oldLine := newKey(t, "ann", "customer")
	next, nextLine := newKey(t, "ann", "operator")
	path := filepath.Join(t.TempDir(), "keys")
	write := func(lines ...string) {
		if err := os.WriteFile(path, []byte(strings.Join(lines, "\n")), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("# keys", "", oldLine)
	keys, err := ReadKeys(path)
	if err != nil {
		t.Fatal(err)
	}
	await := func(key string, good bool) {
		t.Helper()
		// Poll: files do not notify.
		for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(20 * time.Millisecond) {
			_, err := keys.verify(key)
			if (err == nil) == good {
				return
			}
			if time.Now().After(deadline) {
				t.Fatalf("%s: want accepted %t, got %v", key, good, err)
			}
		}
	}
	await(old, true)
	write(oldLine, nextLine)
	await(next, true)
	await(old, true)
	write(nextLine)
	await(old, false)
	write("not a key")
	time.Sleep(1100 * time.Millisecond) // longer than the reload interval: the bad file must have no effect
	await(next, true)
}
