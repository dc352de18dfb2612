package rabbit

import (
	"bytes"
	"slices"

	"example.com/shop/internal/messaging"
	amqp "github.com/rabbitmq/amqp091-go"
)

// drainReturns takes what the library has heard so far.
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

// takeReturn finds the return of a message whose confirm has arrived, and takes it out of those that wait.
//
// A return carries nothing that was not published, and one ID may be in flight twice. So the whole message is compared.
// Two messages that agree in ID, type, key and payload are copies of one, and it does not matter which of them is
// parked.
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
