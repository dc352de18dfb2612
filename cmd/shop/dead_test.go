package main

import (
	"bufio"
	"errors"
	"fmt"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"testing"
)

func TestDeadListAndShow(t *testing.T) {
	f := newFixture(t)
	f.wantOutput(0, "dead list", `^no dead letters\n$`)
	message := newID()
	f.addLetter(f.group.Name, message, "exhausted")
	f.addLetter("", newID(), "unroutable")
	f.addLetter("gone", "", "no_id")
	f.exec(`UPDATE dead_letter SET resolution = 'discarded', resolved_at = now() WHERE id = 3`)
	f.wantOutput(0, "dead list", `ID +DIED +GROUP`,
		`1 +20\S+ \S+ +`+f.group.Name+` +exhausted +3 +`+message+` .* open +it is\\x1b\[31m broken`,
		`2 .* relay +unroutable`)
	for args, want := range map[string]string{
		"": "[1 2]", "--resolved": "[1 2 3]", "--id=2 --id=1": "[1 2]", "--id=2": "[2]",
		"--group=relay": "[2]", "--group=" + f.group.Name: "[1]", "--message-id=" + message: "[1]",
		"--type=" + f.group.Types[0]: "[1 2]", "--type=x": "[]", "--key=k": "[1 2]", "--key=x": "[]",
		"--cause=unroutable": "[2]", "--since=1h": "[1 2]", "--until=1h": "[]",
		"--limit=1": "[1] next 1", "--limit=1 --after=1": "[2]", "--after=2": "[]",
	} {
		var answer struct {
			Letters []letterView `json:"letters"`
			Next    int64        `json:"next_after"`
		}
		f.runJSON(0, "dead list "+args, &answer)
		ids := []int64{}
		for _, letter := range answer.Letters {
			ids = append(ids, letter.ID)
			if letter.Payload != nil {
				t.Error("the list contains payloads")
			}
		}
		got := fmt.Sprint(ids)
		if answer.Next != 0 {
			got += fmt.Sprint(" next ", answer.Next)
		}
		if got != want {
			t.Errorf("%s: got %s, want %s", args, got, want)
		}
	}
	f.wantOutput(0, "dead list --limit=1", `there are more: --after=1`)

	f.run(0, "dead", "discard", "--id=2", "--reason=a test", "--actor=bob")
	f.wantOutput(0, "dead show 2", `state +discarded`, `group +relay`, `cause +unroutable`, `header tenant +a`,
		`discarded +20.* by bob: a test`, `300 bytes`, `00000000  c0 ff ee`, `and 44 bytes more: --full`)
	f.wantOutput(0, "dead show 2 --full", `00000120  .*\n$`)
	var view letterView
	f.runJSON(0, "dead show 2", &view)
	if len(view.Payload) != 300 || len(view.Audit) != 1 || view.Audit[0].Actor != "bob" ||
		view.Headers["tenant"] != "a" {
		t.Errorf("got %+v", view)
	}
	f.wantOutput(1, "dead show 99", `^shop: there is no dead letter 99\n$`)
}

func TestDeadRedriveAndDiscard(t *testing.T) {
	f := newFixture(t)
	f.addLetter(f.group.Name, newID(), "exhausted")
	f.addLetter("", newID(), "unroutable")
	f.addLetter(f.group.Name, newID(), "outside_window")
	f.addLetter("gone", newID(), "permanent")
	states := `SELECT coalesce(resolution, 'open') FROM dead_letter ORDER BY id`

	f.wantOutput(0, "dead redrive --id=1 --reason=why --dry-run",
		`^dead letter 1 of `+f.group.Name+`, exhausted, .*: would be redriven\n`+
			`1 redriven, 0 duplicate, 0 not resolved \(dry run`)
	f.wantRows("open, open, open, open", states)
	f.wantOutput(1, "dead redrive --all --reason=fixed --rate=1000",
		`letter 1 .*: redriven\n`, `letter 2 of relay, .*: redriven\n`, `letter 3 .*: not resolved: .*force`,
		`letter 4 .*: not resolved: consumer group "gone" no longer exists`,
		`\n2 redriven, 0 duplicate, 2 not resolved\n`, `shop: 2 dead letters were not resolved\n$`)
	f.wantRows("redriven, redriven, open, open", states)
	f.wantRows("ann fixed, ann fixed", `SELECT actor || ' ' || reason FROM dead_letter_audit`)
	f.wantRows("1 1", `SELECT (SELECT count(*) FROM outbox) || ' ' || (SELECT count(*) FROM inbox_retry)`)

	type summary struct{ Summary map[string]any }
	var answer summary
	f.runJSON(0, "dead redrive --id=3 --reason=harmless --force --actor=bob", &answer)
	if answer.Summary["redriven"] != 1.0 || answer.Summary["unresolved"] != 0.0 {
		t.Errorf("got %v", answer)
	}
	f.runJSON(1, "dead discard --id=3 --id=4 --id=99 --reason=gone", &answer)
	if answer.Summary["discarded"] != 1.0 || answer.Summary["unresolved"] != 2.0 {
		t.Errorf("got %v", answer)
	}
	f.wantRows("redriven, redriven, redriven, discarded", states)
	f.wantOutput(1, "dead discard --id=99 --reason=x", `letter 99: not resolved: dead letter is not open`)
	f.wantOutput(0, "dead discard --all --reason=x", `^0 discarded, 0 not resolved\n$`)
}

// Ctrl-C is an error, and the command prints exactly what it has done.
func TestRedriveIsBrokenOff(t *testing.T) {
	for name, test := range map[string]struct {
		args   []string
		signal syscall.Signal
		sum    string // format of the last line: how many were resolved, and how many are left
		what   string
	}{
		"interrupted": {
			[]string{"redrive"}, syscall.SIGINT, "%d redriven, 0 duplicate, 0 not resolved, %d left\n", "redriven",
		},
		"terminated": {
			[]string{"discard"}, syscall.SIGTERM, "%d discarded, 0 not resolved, %d left\n", "discarded",
		},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFixture(t)
			const n = 250
			for range n {
				f.addLetter("", newID(), "unroutable")
			}
			args := slices.Concat([]string{"dead"}, test.args, []string{"--all", "--reason=why", "--rate=20"})
			command := exec.CommandContext(t.Context(), binary(), args...)
			var stderr strings.Builder
			command.Env, command.Stderr = f.environment, &stderr
			stdout, err := command.StdoutPipe()
			if err == nil {
				err = command.Start()
			}
			if err != nil {
				t.Fatal(err)
			}
			var last string
			lines := 0
			for scanner := bufio.NewScanner(stdout); scanner.Scan(); {
				last = scanner.Text() + "\n"
				if lines++; lines == 3 {
					if err := command.Process.Signal(test.signal); err != nil {
						t.Fatal(err)
					}
				}
			}
			var exit *exec.ExitError
			if err := command.Wait(); !errors.As(err, &exit) || exit.ExitCode() != 1 {
				t.Errorf("ended with %v", err)
			}
			done := lines - 1
			if want := fmt.Sprintf(test.sum, done, n-done); last != want {
				t.Errorf("summary is %q after %d lines", last, done)
			}
			f.wantRows(fmt.Sprint(done), `SELECT count(*)::text FROM dead_letter WHERE resolution = '`+test.what+`'`)
			if !strings.Contains(stderr.String(), fmt.Sprintf("interrupted with %d dead letters left", n-done)) {
				t.Errorf("error: %s", stderr.String())
			}
		})
	}
}
