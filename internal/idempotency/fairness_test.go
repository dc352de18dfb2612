package idempotency

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"testing"

	"example.com/shop/internal/dev/probe"
	"example.com/shop/internal/postgres"
)

// Calls with a key continue for one caller while another makes any number of slow ones.
func TestOneCallersSlowCallsDoNotBlockOthers(t *testing.T) {
	t.Parallel()
	b := setup(t)
	db, err := postgres.Open(t.Context(), postgres.Config{URL: b.db.Config().ConnString(), MaxConns: 10})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(db.Close)
	b.db = db
	b.keys = b.newKeys()
	b.client = b.serve(t, b.keys)
	const slow, share = 12, 3 // there are four places
	began, finish := make(chan struct{}, slow), make(chan struct{})
	b.then = func(_ context.Context, text string) error {
		if strings.HasPrefix(text, "slow") {
			began <- struct{}{}
			<-finish
		}
		return nil
	}
	var callers sync.WaitGroup
	for i := range slow {
		callers.Go(func() {
			text, key := fmt.Sprint("slow", i), fmt.Sprint("key", i)
			if _, _, err := send(t.Context(), b.client, probe.Mutate, text, key, "alice"); err != nil {
				t.Errorf("slow call: %v", err)
			}
		})
	}
	for range share {
		<-began
	}
	for i := range 5 {
		if _, _, err := send(t.Context(), b.client, probe.Mutate, "quick", fmt.Sprint("key", i), "bob"); err != nil {
			t.Errorf("call of another caller: %v", err)
		}
	}
	if n := len(began); n > 0 {
		t.Errorf("the slow caller has %d places more than its share", n)
	}
	close(finish)
	callers.Wait()
	if n := len(b.keys.shares.taken); n > 0 {
		t.Errorf("%d shares are left", n)
	}
}
