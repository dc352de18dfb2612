package main

import (
	"fmt"
	"testing"
)

// What the console does to groups and keys, the commands do, too, with the rights of shop_operator and with a record.
func TestConsumerCommands(t *testing.T) {
	o := newOffice(t)
	name := o.group.Name
	for i := range 3 {
		o.exec(`INSERT INTO inbox_retry (consumer, message_id, type, key, payload, headers, attempts, due_at, last_error)
			VALUES ($1, $2, 't.T', 'k', '', '{}', 1, now(), E'it is\x1b[31m broken')`, name, fmt.Sprint("m", i))
	}
	o.says(0, "consumer ls", name+` +no process runs it +0 +3 `, `operations`, name+` +k +3 .* m0 +it is\\x1b\[31m broken`)
	o.says(0, "consumer pause "+name+" --reason=why", "is paused")
	o.says(1, "consumer pause "+name+" --reason=why", "paused already")
	o.says(1, "consumer pause nobody --reason=why", "there is no consumer group")
	o.says(2, "consumer pause "+name, "--reason")
	o.says(0, "consumer ls", name+` +paused by ann: why`)
	var list struct {
		Groups []struct {
			groupView
		} `json:"groups"`
		BlockedKeys []any `json:"blocked_keys"`
	}
	o.json(0, "consumer ls", &list)
	if len(list.Groups) < 2 || list.Groups[0].PausedBy != "ann" || len(list.BlockedKeys) != 1 {
		t.Errorf("%+v", list)
	}
	o.says(0, "consumer resume "+name+" --reason=why", "goes on")
	o.says(0, "consumer skip "+name+" k --reason=why --actor=bob", "message m0 is a dead letter")
	o.says(0, "consumer park "+name+" k --reason=why", "2 messages are dead letters")
	o.says(1, "consumer skip "+name+" k --reason=why", "nothing waits on key")
	o.want(name+" pause ann, "+name+" resume ann, "+name+"/k skip bob, "+name+"/k park ann",
		`SELECT target || ' ' || action || ' ' || actor FROM operator_audit ORDER BY id`)

	o.says(0, "dead discard --id=1 --reason=why", "1 discarded")
	o.says(0, "dead reopen 1 --reason=mistake", "open again")
	o.says(1, "dead reopen 1 --reason=mistake", "not discarded")
	o.want("discarded why, reopened mistake", `SELECT resolution || ' ' || reason FROM dead_letter_audit ORDER BY id`)
}

// A list that is cut says so.
func TestConsumerLsOfManyKeys(t *testing.T) {
	o := newOffice(t)
	o.exec(`INSERT INTO inbox_retry (consumer, message_id, type, key, payload, headers, attempts, due_at, last_error)
		SELECT $1, n::text, 't.T', 'key-' || n, '', '{}', 1, now(), 'broken' FROM generate_series(1, $2::integer) AS n`, o.group.Name, mostKeys+1)
	o.says(0, "consumer ls", fmt.Sprintf(` %d\n`, mostKeys+1), `key-1 `, `no more than 100 keys are listed, those that have been blocked longest\n$`)
}
