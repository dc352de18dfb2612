package ops

import (
	"testing"

	"example.com/shop/internal/dev/testenv"
)

// A transaction-mode pooler loses LISTEN but not NOTIFY, and the doctor notices.
func TestDoorbellThroughAPooler(t *testing.T) {
	t.Parallel()
	direct := testenv.PostgresURL(t)
	pooled := testenv.PgBouncer(t, direct)
	if _, err := tryDoorbell(t.Context(), pooled, direct); err != nil {
		t.Errorf("rung through the pooler: %v", err)
	}
	if _, err := tryDoorbell(t.Context(), direct, pooled); err == nil {
		t.Error("the ring arrived through the pooler")
	}
}
