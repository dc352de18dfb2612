package main

import (
	"testing"

	"example.com/shop/internal/operations"
)

func TestConsumerLsListsDurableCalls(t *testing.T) {
	f := newFixture(t)
	f.wantOutput(0, "consumer ls", operations.Consumer)
}

// The message of an ended durable call is not redriven: its caller already has the result.
func TestDeadLettersOfDurableCalls(t *testing.T) {
	f := newFixture(t)
	id := newID()
	f.exec(`INSERT INTO operation
			(id, caller, idempotency_key, method, request, request_hash, identity, signature, state, error, ended_at)
		VALUES ($1, 'ann', 'key', 'm', '', '', '', '', 'failed', '', now())`, id)
	f.exec(`INSERT INTO dead_letter (consumer, message_id, type, key, payload, headers, reason, error, attempts)
		VALUES ('operations', $1, $2, '', '', '{}', 'exhausted', 'broken', 10)`, id, operations.MessageType)
	f.wantOutput(1, "dead redrive --id=1 --reason=why",
		`letter 1 of operations, .*: not resolved: its durable call has ended as failed, and its caller has that result: `+
			`only the caller can submit it again`, `0 redriven, 0 duplicate, 1 not resolved\n`)
	f.wantOutput(0, "dead discard --id=1 --reason=why", `1 discarded, 0 not resolved`)
}
