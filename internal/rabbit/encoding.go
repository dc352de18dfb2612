package rabbit

import (
	"fmt"
	"strings"

	"example.com/orders/internal/messaging"
	amqp "github.com/rabbitmq/amqp091-go"
)

const (
	// keyHeader carries the message's key.
	keyHeader = messaging.KeyHeader
	// contentType of every message that we send.
	contentType = "application/protobuf"
)

// encode makes a publishing. Only what stands here becomes an AMQP property: a header of the sender's must not be able to expire the
// message, to answer elsewhere, or to send it to another queue (CC). Header names were checked by Validate; here they go into the header
// table and nowhere else.
func encode(m messaging.Message) amqp.Publishing {
	headers := make(amqp.Table, len(m.Headers)+1)
	for name, value := range m.Headers {
		headers[name] = value
	}
	delete(headers, keyHeader) // the key is the message's, and no header may pass for it
	if m.Key != "" {
		headers[keyHeader] = m.Key
	}
	return amqp.Publishing{
		MessageId: m.ID.String(), Type: m.Type, ContentType: contentType, DeliveryMode: amqp.Persistent,
		Timestamp: m.CreatedAt, Headers: headers, Body: m.Payload,
	}
}

// decode takes a delivery as it comes; the inbox judges it.
func decode(d *amqp.Delivery) messaging.Delivery {
	headers := make(map[string]string, len(d.Headers))
	for name, value := range d.Headers {
		if text, ok := value.(string); ok && name != keyHeader && !strings.HasPrefix(name, "x-") {
			headers[name] = text
		}
	}
	key, _ := d.Headers[keyHeader].(string)
	var count int64
	if d.Redelivered { // else the sender set the header
		count, _ = d.Headers["x-delivery-count"].(int64)
	}
	kind := d.Type
	if kind == "" {
		kind = d.RoutingKey
	}
	return messaging.Delivery{ID: d.MessageId, Type: kind, Key: key, Payload: d.Body, Headers: headers, Count: count, Death: deathOf(d.Headers)}
}

// deathOf puts in words what the broker notes when it moves a message to another queue.
func deathOf(headers amqp.Table) string {
	deaths, _ := headers["x-death"].([]any)
	if len(deaths) == 0 {
		return ""
	}
	newest, _ := deaths[0].(amqp.Table)
	return fmt.Sprintf("%v, %v times, from queue %v", newest["reason"], newest["count"], newest["queue"])
}
