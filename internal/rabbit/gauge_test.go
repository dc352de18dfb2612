package rabbit

import (
	"context"
	"testing"
	"time"

	"example.com/shop/internal/dev/testenv"
)

// A gauge reports queue depths and missing queues, and recovers when the broker is reachable again.
func TestGauge(t *testing.T) {
	t.Parallel()
	proxy, url := testenv.ProxyURL(t, testenv.AMQP(t))
	topology := Topology{Exchange: "events", Queues: []Queue{{Name: "there", Types: []string{"t.T"}}}}
	if err := topology.Declare(t.Context(), url); err != nil {
		t.Fatal(err)
	}
	gauge := NewGauge(url, "test")
	defer gauge.Close()
	read := func() ([]Depth, error) {
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		return gauge.Read(ctx, []string{"missing", "there", "also missing", DeadQueue("there")})
	}
	check := func() {
		t.Helper()
		depths, err := read()
		if err != nil || len(depths) != 4 {
			t.Fatalf("got %v, %v", depths, err)
		}
		for i, missing := range []bool{true, false, true, false} {
			if depths[i].Missing != missing {
				t.Errorf("queue %s: missing %t", depths[i].Queue, depths[i].Missing)
			}
		}
	}
	check()
	check()
	proxy.Refuse(true)
	proxy.Cut()
	if depths, err := read(); err == nil {
		t.Errorf("without a broker: got %v, want an error", depths)
	}
	proxy.Refuse(false)
	testenv.Eventually(t, 20*time.Second, func() error { _, err := read(); return err })
	check()
	proxy.Freeze(true)
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if depths, err := gauge.Read(ctx, []string{"there"}); err == nil {
		t.Errorf("from a broker that does not respond: got %v, want an error", depths)
	}
	proxy.Freeze(false)
}
