package rabbit

import "time"

// ackInterval is how long acks are gathered, so that one says what many would (docs/adr/0019).
const ackInterval = 20 * time.Millisecond

// acks keeps account of the deliveries of one channel, whose tags count from 1, and of what their acks are to say.
type acks struct {
	done    uint64          // every delivery up to this one is handled
	last    uint64          // the last one up to there that is not acked; 0 if all are
	beyond  map[uint64]bool // handled while one before it is not: whether it is acked
	waiting []uint64        // handled since the last call of next, in the order in which that happened
}

// add notes that a delivery is handled.
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

// next returns what is to be acked: everything up to a delivery, unless that is 0, and by itself each one beyond the first that is still at work.
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
