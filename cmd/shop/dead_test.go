package main

import (
	"bufio"
	"errors"
	"fmt"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"example.com/shop/internal/operations"
)

func TestDeadListAndShow(t *testing.T) {
	o := newOffice(t)
	o.says(0, "dead list", `^no dead letters\n$`)
	message := newID()
	o.letter(o.group.Name, message, "exhausted")
	o.letter("", newID(), "unroutable")
	o.letter("gone", "", "no_id")
	o.exec(`UPDATE dead_letter SET resolution = 'discarded', resolved_at = now() WHERE id = 3`)
	o.says(0, "dead list", `ID +DIED +GROUP`, `1 +20\S+ \S+ +`+o.group.Name+` +exhausted +3 +`+message+` .* open +it is\\x1b\[31m broken`, `2 .* relay +unroutable`)
	for args, want := range map[string]string{
		"": "[1 2]", "--resolved": "[1 2 3]", "--id=2 --id=1": "[1 2]", "--id=2": "[2]", "--group=relay": "[2]", "--group=" + o.group.Name: "[1]", "--message-id=" + message: "[1]",
		"--type=" + o.group.Types[0]: "[1 2]", "--type=x": "[]", "--key=k": "[1 2]", "--key=x": "[]", "--cause=unroutable": "[2]", "--since=1h": "[1 2]", "--until=1h": "[]",
		"--limit=1": "[1] next 1", "--limit=1 --after=1": "[2]", "--after=2": "[]",
	} {
		var answer struct {
			Letters []letterView `json:"letters"`
			Next    int64        `json:"next_after"`
		}
		o.json(0, "dead list "+args, &answer)
		ids := []int64{}
		for _, one := range answer.Letters {
			ids = append(ids, one.ID)
			if one.Payload != nil {
				t.Error("the list shows payloads")
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
	o.says(0, "dead list --limit=1", `there are more: --after=1`)

	o.run(0, "dead", "discard", "--id=2", "--reason=a test", "--actor=bob")
	o.says(0, "dead show 2", `state +discarded`, `group +relay`, `cause +unroutable`, `header tenant +a`, `discarded +20.* by bob: a test`, `300 bytes`,
		`00000000  c0 ff ee`, `and 44 bytes more: --full`)
	o.says(0, "dead show 2 --full", `00000120  .*\n$`)
	var view letterView
	o.json(0, "dead show 2", &view)
	if len(view.Payload) != 300 || len(view.Audit) != 1 || view.Audit[0].Actor != "bob" || view.Headers["tenant"] != "a" {
		t.Errorf("got %+v", view)
	}
	o.says(1, "dead show 99", `^shop: there is no dead letter 99\n$`)
}

func TestDeadRedriveAndDiscard(t *testing.T) {
	o := newOffice(t)
	o.letter(o.group.Name, newID(), "exhausted")
	o.letter("", newID(), "unroutable")
	o.letter(o.group.Name, newID(), "outside_window")
	o.letter("gone", newID(), "permanent")
	states := `SELECT coalesce(resolution, 'open') FROM dead_letter ORDER BY id`

	o.says(0, "dead redrive --id=1 --reason=why --dry-run", `^letter 1 of `+o.group.Name+`, exhausted, .*: would be redriven\n1 redriven, 0 duplicate, 0 not resolved \(dry run`)
	o.want("open, open, open, open", states)
	o.says(1, "dead redrive --all --reason=mended --rate=1000", `letter 1 .*: redriven\n`, `letter 2 of relay, .*: redriven\n`, `letter 3 .*: not resolved: .*force`,
		`letter 4 .*: not resolved: there is no consumer group "gone" any more`, `\n2 redriven, 0 duplicate, 2 not resolved\n`, `shop: 2 letters were not resolved\n$`)
	o.want("redriven, redriven, open, open", states)
	o.want("ann mended, ann mended", `SELECT actor || ' ' || reason FROM dead_letter_audit`)
	o.want("1 1", `SELECT (SELECT count(*) FROM outbox) || ' ' || (SELECT count(*) FROM inbox_retry)`)

	type summary struct{ Summary map[string]any }
	var answer summary
	o.json(0, "dead redrive --id=3 --reason=harmless --force --actor=bob", &answer)
	if answer.Summary["redriven"] != 1.0 || answer.Summary["unresolved"] != 0.0 {
		t.Errorf("got %v", answer)
	}
	o.json(1, "dead discard --id=3 --id=4 --id=99 --reason=gone", &answer)
	if answer.Summary["discarded"] != 1.0 || answer.Summary["unresolved"] != 2.0 {
		t.Errorf("got %v", answer)
	}
	o.want("redriven, redriven, redriven, discarded", states)
	o.says(1, "dead discard --id=99 --reason=x", `letter 99: not resolved: dead letter is not open`)
	o.says(0, "dead discard --all --reason=x", `^0 discarded, 0 not resolved\n$`)
}

// Ctrl-C is an error, and what the command says it has done is what it has done.
func TestRedriveIsBrokenOff(t *testing.T) {
	for name, test := range map[string]struct {
		args   []string
		signal syscall.Signal
		sum    string // of how many were resolved, and how many are left
		what   string
	}{
		"interrupted": {[]string{"redrive"}, syscall.SIGINT, "%d redriven, 0 duplicate, 0 not resolved, %d left\n", "redriven"},
		"terminated":  {[]string{"discard"}, syscall.SIGTERM, "%d discarded, 0 not resolved, %d left\n", "discarded"},
	} {
		t.Run(name, func(t *testing.T) {
			o := newOffice(t)
			const n = 250
			for range n {
				o.letter("", newID(), "unroutable")
			}
			command := exec.CommandContext(t.Context(), binary(), append([]string{"dead"}, append(test.args, "--all", "--reason=why", "--rate=20")...)...)
			var stderr strings.Builder
			command.Env, command.Stderr = o.environment, &stderr
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
				t.Errorf("it says %q, and has printed %d letters", last, done)
			}
			o.want(fmt.Sprint(done), `SELECT count(*)::text FROM dead_letter WHERE resolution = '`+test.what+`'`)
			if !strings.Contains(stderr.String(), fmt.Sprintf("broken off with %d letters to go", n-done)) {
				t.Errorf("error: %s", stderr.String())
			}
		})
	}
}

// A durable call that has ended has told its caller so: its message is not sent again in vain.
func TestDeadLettersOfDurableCalls(t *testing.T) {
	o := newOffice(t)
	id := newID()
	o.exec(`INSERT INTO operation (id, caller, idempotency_key, method, request, request_hash, identity, signature, state, error, ended_at)
		VALUES ($1, 'ann', 'key', 'm', '', '', '', '', 'failed', '', now())`, id)
	o.exec(`INSERT INTO dead_letter (consumer, message_id, type, key, payload, headers, reason, error, attempts)
		VALUES ('operations', $1, $2, '', '', '{}', 'exhausted', 'broken', 10)`, id, operations.MessageType)
	o.says(1, "dead redrive --id=1 --reason=why", `letter 1 of operations, .*: not resolved: its durable call has ended as failed, and its caller was told so: `+
		`only the caller can submit it again`, `0 redriven, 0 duplicate, 1 not resolved\n`)
	o.says(0, "dead discard --id=1 --reason=why", `1 discarded, 0 not resolved`)
}
