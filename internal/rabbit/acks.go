package rabbit

import "time"

// ackInterval is how long acks are batched, so that one ack covers many deliveries (docs/adr/0019).
const ackInterval = 20 * time.Millisecond

// acks tracks which deliveries of one channel are handled, and which acks are due for them. Delivery tags count from 1.
type acks struct {
	done    uint64          // every delivery up to this tag is handled
	last    uint64          // the highest tag up to done that is not acked yet; 0 if all are acked
	beyond  map[uint64]bool // handled deliveries after one that is not handled; the value tells whether they are acked
	waiting []uint64        // tags handled since the last call of next, in the order of handling
}

// add records that a delivery is handled.
func (a *acks) add(tag uint64) {
	if a.beyond == nil {
		a.beyond = map[uint64]bool{}
	}
	a.waiting = append(a.waiting, tag)
	a.beyond[tag] = false
	for {
		acked, handled := a.beyond[a.done+1]
		if !handled {
			return
		}
		a.done++
		delete(a.beyond, a.done)
		if !acked {
			a.last = a.done
		}
	}
}

// next returns the acks that are due: a cumulative one up to the tag upTo (none if it is 0), and single ones for
// deliveries after the first that is still being handled.
func (a *acks) next() (upTo uint64, single []uint64) {
	for _, tag := range a.waiting {
		if _, beyond := a.beyond[tag]; beyond {
			a.beyond[tag] = true
			single = append(single, tag)
		}
	}
	upTo, a.last, a.waiting = a.last, 0, a.waiting[:0]
	return upTo, single
}
