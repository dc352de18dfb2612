package ops

import (
	"context"
	"fmt"
	"time"

	"example.com/shop/internal/inbox"
)

// maxClockDifference is well within what the outbox accepts, so that there is time to act.
const maxClockDifference = 5 * time.Second

// checkClock compares Postgres' clock with this machine's, and with the times that Postgres itself has written: if
// those are in the future, the clock was set back.
func checkClock(ctx context.Context, target Target) (Finding, error) {
	skew, err := skew(ctx, target.DB)
	if err != nil {
		return Finding{}, err
	}
	if skew.Abs() > maxClockDifference {
		return Finding{Verdict: Wrong, Detail: fmt.Sprintf("Postgres' clock differs by %s", skew)}, nil
	}
	ahead, err := outboxAhead(ctx, target.DB, maxClockDifference)
	if err != nil {
		return Finding{}, err
	}
	more, err := inbox.Ahead(ctx, target.DB, maxClockDifference)
	ahead = append(ahead, more...)
	if len(ahead) > 5 {
		ahead = append(ahead[:5], fmt.Sprintf("and %d more", len(ahead)-5))
	}
	finding, err := listFinding(ahead, err, Wrong, fmt.Sprintf("differs by %s", skew))
	if finding.Verdict == Wrong {
		finding.Detail = "Postgres' clock was set back: " + finding.Detail
	}
	return finding, err
}
