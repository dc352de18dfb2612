package inbox

import (
	"errors"
	"testing"

	"example.com/shop/internal/dev/testenv"
	"example.com/shop/internal/messaging"
	"example.com/shop/internal/postgres"
)

// The broker forgets acked messages. So a message must not be acked because of a row that a failover could revert. That
// applies to first deliveries and to copies, and to messages that the broker gave up delivering.
func TestNothingIsAckedThatAFailoverTakesBack(t *testing.T) {
	t.Parallel()
	primary, standby := testenv.Replicated(t)
	db, err := postgres.Open(t.Context(), postgres.Config{URL: primary.URL()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(db.Close)
	box := New(db, NewGroup("probes"), Config{})
	delivered, undelivered := probe("", "delivered"), probe("", "undelivered")
	standby.Stop()
	for _, which := range []string{"first", "copy"} {
		for how, settle := range map[string]func() error{
			"delivered":   func() error { return box.Process(t.Context(), []messaging.Delivery{delivered}) },
			"undelivered": func() error { return box.Drain(t.Context(), []messaging.Delivery{undelivered}) },
		} {
			if err := settle(); !errors.Is(err, postgres.ErrOutcomeUnknown) {
				t.Errorf("%s, %s: %v, want an unknown outcome", how, which, err)
			}
		}
	}
}
