package rabbit

import (
	"bytes"
	"slices"

	"example.com/shop/internal/messaging"
	amqp "github.com/rabbitmq/amqp091-go"
)

// drainReturns takes the returns that the library has buffered so far.
func (l *link) drainReturns() {
	for {
		select {
		case returned, open := <-l.returns:
			if !open {
				return
			}
			l.returned[returned.MessageId] = append(l.returned[returned.MessageId], returned)
		default:
			return
		}
	}
}

// takeReturn finds and removes the return of a message whose confirm has arrived.
//
// A return contains only what was published, and two messages with the same ID may be in flight. So takeReturn
// compares whole messages. Two messages with the same ID, type, key and payload are copies of one message, and it
// does not matter which of them is parked.
func (l *link) takeReturn(m *messaging.Message) (amqp.Return, bool) {
	if len(l.returned) == 0 { // the usual case
		return amqp.Return{}, false
	}
	id := m.ID.String()
	waiting := l.returned[id]
	i := slices.IndexFunc(waiting, func(r amqp.Return) bool {
		key, _ := r.Headers[keyHeader].(string)
		return r.Type == m.Type && key == m.Key && bytes.Equal(r.Body, m.Payload)
	})
	if i < 0 {
		return amqp.Return{}, false
	}
	found := waiting[i]
	if l.returned[id] = slices.Delete(waiting, i, i+1); len(waiting) == 1 {
		delete(l.returned, id)
	}
	return found, true
}
