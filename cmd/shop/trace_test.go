package main

import (
	"regexp"
	"testing"

	"example.com/shop/internal/ops"
)

func TestTraceOfAMessage(t *testing.T) {
	f := newFixture(t)
	id := f.insertMessages(1)[0]
	f.wantOutput(0, "trace "+id, `message `+id, `type `+regexp.QuoteMeta(f.group.Types[0])+`, key k`,
		`20\S+ \S+Z +outbox +inserted by transaction \d+, shard 0`, `- +relay +waits to be published`)
	f.markDelivered()
	f.exec(`INSERT INTO inbox (slot, consumer, message_id, copies)
		VALUES (floor(extract(epoch FROM now()) / 86400)::bigint % 8, $1, $2, 2)`, f.group.Name, id)
	f.addLetter(f.group.Name, id, "exhausted")
	f.wantOutput(0, "trace "+id, `relay +published`, f.group.Name+` +received`,
		f.group.Name+` +dead letter 1, exhausted after 3 attempts: it is\\x1b`, `dead letter 1 is open`)
	f.run(0, "dead", "redrive", "--id=1", "--reason=fixed")
	f.exec(`UPDATE inbox_retry SET attempts = 2, last_error = 'once more'`)
	f.wantOutput(0, "trace "+id, `dead letter 1 redriven by ann: fixed`,
		`waits for a retry, due 20\S+; 2 attempts failed, the last one with: once more; 2 copies arrived, 1 absorbed`)
	var answer struct {
		MessageID string           `json:"message_id"`
		Outbox    []entryView      `json:"outbox"`
		Groups    []map[string]any `json:"groups"`
		Letters   []letterView     `json:"dead_letters"`
		Steps     []ops.Step       `json:"steps"`
	}
	f.runJSON(0, "trace "+id, &answer)
	if answer.MessageID != id || len(answer.Outbox) != 1 || !answer.Outbox[0].Published ||
		len(answer.Groups) != 1 || len(answer.Letters) != 1 || len(answer.Letters[0].Audit) != 1 ||
		answer.Letters[0].Payload != nil || len(answer.Steps) < 5 {
		t.Errorf("got %+v", answer)
	}
	for _, unknown := range []string{newID(), "anything"} {
		f.wantOutput(1, "trace "+unknown, "^shop: message "+unknown+" is unknown: ")
	}
}
