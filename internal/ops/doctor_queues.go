package ops

import (
	"errors"

	"example.com/shop/internal/rabbit"
)

const repairOfQueue = "Run this check again in a minute. If the problem persists, restart the broker node that leads " +
	"the queue. If that does not help either, delete the queue (rabbitmqctl delete_queue), declare it again " +
	"(command topology --declare), and replay what was in it (command outbox replay)."

// brokenQueue returns the finding of a queue that answers INTERNAL_ERROR, if err means that.
func brokenQueue(err error) (finding Finding, broken bool) {
	if !errors.Is(err, rabbit.ErrQueueBroken) {
		return Finding{}, false
	}
	return Finding{Verdict: Wrong, Detail: err.Error(), Cure: repairOfQueue}, true
}
