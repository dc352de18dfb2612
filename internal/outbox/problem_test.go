package outbox

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"
)

// A failure is told until something got through, and silence when it lasts.
func TestTrouble(t *testing.T) {
	t.Parallel()
	var p problem
	now := time.Now()
	says := func(want string) {
		t.Helper()
		if got := p.text(now); got != want && (want == "" || !strings.HasPrefix(got, want)) {
			t.Errorf("got %q, want %q", got, want)
		}
	}
	says("")
	p.failed(fmt.Errorf("%w: connect:\n%w", errBroker, errors.New("refused")))
	says("connect: refused")
	p.wrote(now.Add(-time.Hour)) // is tried again, and not known to have got through
	says("connect: refused")
	p.settled(nil)
	says("")
	p.wrote(now.Add(-time.Second))
	says("")
	p.wrote(now)
	now = now.Add(time.Minute)
	says("the broker has confirmed nothing for 1m1s")
	p.settled([]flight{{written: now}})
	says("")
}
