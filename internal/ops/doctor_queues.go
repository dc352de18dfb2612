package ops

import (
	"errors"

	"example.com/shop/internal/rabbit"
)

const repairOfQueue = "Look again in a minute. If it stays, restart the broker's node that leads the queue. " +
	"If that does not help either, delete the queue (rabbitmqctl delete_queue), have it declared (command topology " +
	"--declare), " +
	"and replay what stood in it (command outbox replay)."

// brokenQueue makes the finding of a queue that answers INTERNAL_ERROR, if err says so.
func brokenQueue(err error) (finding Finding, broken bool) {
	if !errors.Is(err, rabbit.ErrQueueBroken) {
		return Finding{}, false
	}
	return Finding{Verdict: Wrong, Detail: err.Error(), Cure: repairOfQueue}, true
}
