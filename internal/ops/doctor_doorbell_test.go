package ops

import (
	"testing"

	"example.com/shop/internal/dev/testenv"
)

// LISTEN is lost in such a pooler, and that is noticed. NOTIFY is not.
func TestDoorbellThroughAPooler(t *testing.T) {
	t.Parallel()
	direct := testenv.PostgresURL(t)
	pooled := testenv.PgBouncer(t, direct)
	if _, err := tryDoorbell(t.Context(), pooled, direct); err != nil {
		t.Errorf("rung through the pooler: %v", err)
	}
	if _, err := tryDoorbell(t.Context(), direct, pooled); err == nil {
		t.Error("heard through the pooler")
	}
}
