package main

import (
	"fmt"
	"testing"
)

// The commands manage groups and keys as shop_operator, and with an audit record.
func TestConsumerCommands(t *testing.T) {
	f := newFixture(t)
	name := f.group.Name
	for i := range 3 {
		f.exec(`INSERT INTO inbox_retry
				(consumer, message_id, type, key, payload, headers, attempts, due_at, last_error)
			VALUES ($1, $2, 't.T', 'k', '', '{}', 1, now(), E'it is\x1b[31m broken')`, name, fmt.Sprint("m", i))
	}
	f.wantOutput(0, "consumer ls", name+` +no process runs it +0 +3 `,
		name+` +k +3 .* m0 +it is\\x1b\[31m broken`)
	f.wantOutput(0, "consumer pause "+name+" --reason=why", "is paused")
	f.wantOutput(1, "consumer pause "+name+" --reason=why", "already paused")
	f.wantOutput(1, "consumer pause nobody --reason=why", `consumer group "nobody" does not exist`)
	f.wantOutput(2, "consumer pause "+name, "--reason")
	f.wantOutput(0, "consumer ls", name+` +paused by ann: why`)
	var list struct {
		Groups []struct {
			groupView
		} `json:"groups"`
		BlockedKeys []any `json:"blocked_keys"`
	}
	f.runJSON(0, "consumer ls", &list)
	if len(list.Groups) < 2 || list.Groups[0].PausedBy != "ann" || len(list.BlockedKeys) != 1 {
		t.Errorf("%+v", list)
	}
	f.wantOutput(0, "consumer resume "+name+" --reason=why", "is resumed")
	f.wantOutput(0, "consumer skip "+name+" k --reason=why --actor=bob", "message m0 is now a dead letter")
	f.wantOutput(0, "consumer park "+name+" k --reason=why", "2 messages are dead letters")
	f.wantOutput(1, "consumer skip "+name+" k --reason=why", "nothing waits on key")
	f.wantRows(name+" pause ann, "+name+" resume ann, "+name+"/k skip bob, "+name+"/k park ann",
		`SELECT target || ' ' || action || ' ' || actor FROM operator_audit ORDER BY id`)

	f.wantOutput(0, "dead discard --id=1 --reason=why", "1 discarded")
	f.wantOutput(0, "dead reopen 1 --reason=mistake", "open again")
	f.wantOutput(1, "dead reopen 1 --reason=mistake", "not discarded")
	f.wantRows("discarded why, reopened mistake",
		`SELECT resolution || ' ' || reason FROM dead_letter_audit ORDER BY id`)
}

// A truncated list says so.
func TestConsumerLsOfManyKeys(t *testing.T) {
	f := newFixture(t)
	f.exec(`INSERT INTO inbox_retry (consumer, message_id, type, key, payload, headers, attempts, due_at, last_error)
		SELECT $1, n::text, 't.T', 'key-' || n, '', '{}', 1, now(), 'broken' FROM generate_series(1, $2::integer) AS n`,
		f.group.Name, maxKeys+1)
	f.wantOutput(0, "consumer ls", fmt.Sprintf(` %d\n`, maxKeys+1), `key-1 `,
		`only the 100 keys that have been blocked longest are listed\n$`)
}
