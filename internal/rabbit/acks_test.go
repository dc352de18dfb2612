package rabbit

import (
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

func TestAcks(t *testing.T) {
	t.Parallel()

	type due struct {
		UpTo   uint64
		Single []uint64
	}
	for _, test := range []struct {
		name    string
		handled [][]uint64 // before each call of next
		want    []due
	}{
		{"OneAckCoversMany", [][]uint64{{1, 2, 3}, {4}, {}}, []due{{UpTo: 3}, {UpTo: 4}, {}}},
		{"OrderDoesNotMatter", [][]uint64{{3, 1, 2}}, []due{{UpTo: 3}}},
		{"ASlowDeliveryDelaysNoOther", [][]uint64{{1, 3}, {}}, []due{{UpTo: 1, Single: []uint64{3}}, {}}},
		{"ASingleAckIsNotRepeated", [][]uint64{{2}, {1}}, []due{{Single: []uint64{2}}, {UpTo: 1}}},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			var a acks
			for i, tags := range test.handled {
				for _, tag := range tags {
					a.add(tag)
				}
				upTo, single := a.next()
				if diff := cmp.Diff(test.want[i], due{upTo, single}); diff != "" {
					t.Errorf("call %d: %s", i, diff)
				}
			}
		})
	}
}

// TestAcksAgainstABroker simulates a broker, which closes a channel if it acks a delivery that is not outstanding.
func TestAcksAgainstABroker(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(r *rapid.T) {
		var a acks
		tags := rapid.Permutation(sequence(rapid.IntRange(0, 30).Draw(r, "deliveries"))).Draw(r, "order")
		outstanding, handled := map[uint64]bool{}, map[uint64]bool{}
		for _, tag := range tags {
			outstanding[tag] = true
		}
		flush := func() {
			upTo, single := a.next()
			if upTo > 0 {
				single = append(single, upTo)
			}
			for _, tag := range single {
				if !outstanding[tag] {
					r.Fatalf("%d is not outstanding", tag)
				}
			}
			for tag := range outstanding {
				if tag <= upTo {
					single = append(single, tag)
				}
			}
			for _, tag := range single {
				if !handled[tag] {
					r.Fatalf("%d is acked but not handled", tag)
				}
				delete(outstanding, tag)
			}
		}
		for _, tag := range tags {
			a.add(tag)
			handled[tag] = true
			if rapid.Bool().Draw(r, "flush") {
				flush()
			}
			if got, want := len(a.waiting), len(handled)+len(outstanding)-len(tags); got != want {
				r.Fatalf("%d deliveries wait for acks, want %d", got, want)
			}
		}
		flush()
		if len(outstanding) > 0 {
			r.Fatalf("never acked: %v", outstanding)
		}
	})
}

func sequence(n int) []uint64 {
	tags := make([]uint64, n)
	for i := range tags {
		tags[i] = uint64(i + 1)
	}
	return tags
}

// Only a lane handles deliveries in order. Without order, the number of acks depends on which handlers end first.
func TestAcksAreBatched(t *testing.T) {
	t.Parallel()
	const n = 200
	url, p := setUp(t)
	broker, through := newAlarm(t, url)
	mustPublish(t, p, texts(0, n)...)
	gate := newGated()
	consumer := consume(t, ConsumerConfig{URL: through, Batch: 1}, gate.handle)
	ready(t, url, 0)
	released := time.Now()
	close(gate.release)
	for range n {
		receive(t, gate.begun)
	}
	// A starved consumer handles few deliveries per interval, and acks once per interval.
	most := max(n/4, int64(time.Since(released)/ackInterval)+n/10)
	consumer.stop()
	if got := broker.acks.Load(); got == 0 || got > most {
		t.Errorf("%d acks for %d deliveries, want 1 to %d", got, n, most)
	}
}

// If some deliveries are stuck, acks of the others must be sent before the rest of the prefetch is used up. Otherwise
// the others would have to wait for ackInterval.
func TestStuckDeliveriesDoNotStarveTheOthers(t *testing.T) {
	t.Parallel()
	for name, config := range map[string]ConsumerConfig{"Lanes": {Lanes: 2}, "Unordered": {Unordered: true}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			for config.Prefetch = 1; config.Prefetch < 100; config.Prefetch++ {
				for stuck := range config.Prefetch {
					left := config.Prefetch - stuck
					if got := NewConsumer(config, nil).ackSize(stuck); got > (left+3)/4 {
						t.Fatalf("%d of %d stuck: acks are sent in batches of %d", stuck, config.Prefetch, got)
					}
				}
			}
		})
	}
}
