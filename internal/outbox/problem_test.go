package outbox

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"
)

// text reports a failure until a page is settled, and reports the broker's silence once it lasts.
func TestTrouble(t *testing.T) {
	t.Parallel()
	var p problem
	now := time.Now()
	wantText := func(want string) {
		t.Helper()
		if got := p.text(now); got != want && (want == "" || !strings.HasPrefix(got, want)) {
			t.Errorf("got %q, want %q", got, want)
		}
	}
	wantText("")
	p.failed(fmt.Errorf("%w: connect:\n%w", errBroker, errors.New("refused")))
	wantText("connect: refused")
	p.wrote(now.Add(-time.Hour)) // the next try, not confirmed yet
	wantText("connect: refused")
	p.settled(nil)
	wantText("")
	p.wrote(now.Add(-time.Second))
	wantText("")
	p.wrote(now)
	now = now.Add(time.Minute)
	wantText("the broker has confirmed nothing for 1m1s")
	p.settled([]flight{{written: now}})
	wantText("")
}
