package rabbit

import "time"

// ackInterval is how long acks are gathered, so that one says what many would (docs/adr/0019). A crash in the meantime only makes more duplicates.
const ackInterval = 20 * time.Millisecond

// acks keeps account of the deliveries of one channel, whose tags count from 1: those that are handled and not acked yet.
type acks struct {
	upTo   uint64 // everything up to it is handled
	last   uint64 // the last one up to there that is not acked; 0 if all are
	beyond map[uint64]ackState
	n      int
}

// ackState is that of a delivery which is handled while one before it is not.
type ackState int

const (
	ackNew ackState = iota
	ackLate
	acked
)

// add notes that a delivery is handled.
func (a *acks) add(tag uint64) {
	if a.beyond == nil {
		a.beyond = map[uint64]ackState{}
	}
	a.beyond[tag] = ackNew
	a.n++
	for {
		state, handled := a.beyond[a.upTo+1]
		if !handled {
			return
		}
		delete(a.beyond, a.upTo+1)
		a.upTo++
		if state != acked {
			a.last = a.upTo
		}
	}
}

// waiting is how many deliveries are handled and not acked.
func (a *acks) waiting() int { return a.n }

// next returns what is to be acked: everything up to a delivery, unless that is 0, and some more by themselves. Those are they that a slow one
// before them has held up since the call before, or, if all is set, all of them.
func (a *acks) next(all bool) (upTo uint64, single []uint64) {
	upTo, a.last, a.n = a.last, 0, 0
	for tag, state := range a.beyond {
		switch {
		case state == acked:
		case state == ackLate, all:
			a.beyond[tag] = acked
			single = append(single, tag)
		default:
			a.beyond[tag] = ackLate
			a.n++
		}
	}
	return upTo, single
}
