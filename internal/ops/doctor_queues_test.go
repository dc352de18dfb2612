package ops

import (
	"fmt"
	"strings"
	"testing"

	"example.com/shop/internal/rabbit"
)

func TestDoctorDescribesTheRepairOfABrokenQueue(t *testing.T) {
	t.Parallel()
	finding, broken := brokenQueue(fmt.Errorf("declare queue group: %w", rabbit.ErrQueueBroken))
	if !broken || finding.Verdict != Wrong || !strings.Contains(finding.Detail, "queue group") {
		t.Errorf("got %+v, %t", finding, broken)
	}
	for _, step := range []string{"restart", "delete", "topology --declare", "replay"} {
		if !strings.Contains(finding.Cure, step) {
			t.Errorf("the cure does not mention %s: %s", step, finding.Cure)
		}
	}
	for _, other := range []error{nil, rabbit.Check(t.Context(), "amqp://127.0.0.1:1/")} {
		if _, broken := brokenQueue(other); broken {
			t.Errorf("%v is taken for a broken queue", other)
		}
	}
}
