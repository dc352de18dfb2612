package rabbit

import (
	"testing"

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
		all     bool
		want    []due
	}{
		{name: "OneSaysWhatManyWould", handled: [][]uint64{{1, 2, 3}, {4}, {}}, want: []due{{UpTo: 3}, {UpTo: 4}, {}}},
		{name: "OrderDoesNotMatter", handled: [][]uint64{{3, 1, 2}}, want: []due{{UpTo: 3}}},
		{name: "ASlowOneIsWaitedForOnce", handled: [][]uint64{{2}, {1}}, want: []due{{}, {UpTo: 2}}},
		{name: "AndThenHoldsUpNoOther", handled: [][]uint64{{2}, {}, {}}, want: []due{{}, {Single: []uint64{2}}, {}}},
		{name: "WhatIsAckedByItselfIsNotAckedAgain", handled: [][]uint64{{2}, {}, {1}}, want: []due{{}, {Single: []uint64{2}}, {UpTo: 1}}},
		{name: "All", handled: [][]uint64{{1, 3}}, all: true, want: []due{{UpTo: 1, Single: []uint64{3}}}},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			var a acks
			for i, tags := range test.handled {
				for _, tag := range tags {
					a.add(tag)
				}
				upTo, single := a.next(test.all)
				if diff := cmp.Diff(test.want[i], due{upTo, single}); diff != "" {
					t.Errorf("call %d: %s", i, diff)
				}
			}
		})
	}
}

// TestAcksAgainstABroker plays a broker, which closes a channel that acks what is not outstanding on it.
func TestAcksAgainstABroker(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(r *rapid.T) {
		var a acks
		tags := rapid.Permutation(sequence(rapid.IntRange(0, 30).Draw(r, "deliveries"))).Draw(r, "order")
		outstanding, handled := map[uint64]bool{}, map[uint64]bool{}
		for _, tag := range tags {
			outstanding[tag] = true
		}
		flush := func(all bool) {
			upTo, single := a.next(all)
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
					r.Fatalf("%d is acked and not handled", tag)
				}
				delete(outstanding, tag)
			}
		}
		for _, tag := range tags {
			a.add(tag)
			handled[tag] = true
			if rapid.Bool().Draw(r, "flush") {
				flush(false)
			}
			if got, want := a.waiting(), len(handled)+len(outstanding)-len(tags); got != want {
				r.Fatalf("%d wait, want %d", got, want)
			}
		}
		flush(true)
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
