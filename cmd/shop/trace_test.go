package main

import (
	"regexp"
	"testing"

	"example.com/shop/internal/ops"
)

func TestTraceOfAMessage(t *testing.T) {
	o := newOffice(t)
	id := o.insert(1)[0]
	o.says(0, "trace "+id, `message `+id, `type `+regexp.QuoteMeta(o.group.Types[0])+`, key k`, `20\S+ \S+Z +outbox +inserted by transaction \d+, shard 0`, `- +relay +waits to be published`)
	o.delivered()
	o.exec(`INSERT INTO inbox (slot, consumer, message_id, copies) VALUES (floor(extract(epoch FROM now()) / 86400)::bigint % 8, $1, $2, 2)`, o.group.Name, id)
	o.letter(o.group.Name, id, "exhausted")
	o.says(0, "trace "+id, `relay +published`, o.group.Name+` +received`, o.group.Name+` +dead letter 1, exhausted after 3 attempts: it is\\x1b`, `dead letter 1 is open`)
	o.run(0, "dead", "redrive", "--id=1", "--reason=mended")
	o.exec(`UPDATE inbox_retry SET attempts = 2, last_error = 'once more'`)
	o.says(0, "trace "+id, `dead letter 1 redriven by ann: mended`, `waits for a retry, due 20\S+; 2 attempts failed, the last one with: once more; 2 copies came, 1 absorbed`)
	var answer struct {
		MessageID string           `json:"message_id"`
		Outbox    []entryView      `json:"outbox"`
		Groups    []map[string]any `json:"groups"`
		Letters   []letterView     `json:"dead_letters"`
		Steps     []ops.Step       `json:"steps"`
	}
	o.json(0, "trace "+id, &answer)
	if answer.MessageID != id || len(answer.Outbox) != 1 || !answer.Outbox[0].Published || len(answer.Groups) != 1 || len(answer.Letters) != 1 ||
		len(answer.Letters[0].Audit) != 1 || answer.Letters[0].Payload != nil || len(answer.Steps) < 5 {
		t.Errorf("got %+v", answer)
	}
	for _, unknown := range []string{newID(), "anything"} {
		o.says(1, "trace "+unknown, "^shop: message "+unknown+" is not known: neither outbox nor inbox nor dead letters hold it")
	}
}
