package rabbit

import (
	"cmp"
	"fmt"
	"strings"

	"example.com/shop/internal/messaging"
	amqp "github.com/rabbitmq/amqp091-go"
)

const (
	// keyHeader carries the message's key.
	keyHeader = messaging.KeyHeader
	// contentType of every message that we send.
	contentType = "application/protobuf"
)

// encode makes a publishing. Only the fields set here become AMQP properties: a sender's header must not be able to
// expire the message, to redirect replies, or to route it to another queue (CC). Validate has checked the header names;
// here they go into the header table and nowhere else.
func encode(m messaging.Message) amqp.Publishing {
	headers := make(amqp.Table, len(m.Headers)+1)
	for name, value := range m.Headers {
		headers[name] = value
	}
	delete(headers, keyHeader) // only the message itself sets the key
	if m.Key != "" {
		headers[keyHeader] = m.Key
	}
	return amqp.Publishing{
		MessageId: m.ID.String(), Type: m.Type, ContentType: contentType, DeliveryMode: amqp.Persistent,
		Timestamp: m.CreatedAt, Headers: headers, Body: m.Payload,
	}
}

// decode converts a delivery without judging it; the inbox does that. It drops nothing that the sender set except
// headers x-…, which belong to the broker.
func decode(d *amqp.Delivery) messaging.Delivery {
	headers := make(map[string]string, len(d.Headers))
	for name, value := range d.Headers {
		if name != keyHeader && !strings.HasPrefix(name, "x-") {
			headers[name] = toText(value)
		}
	}
	if d.ContentType != "" && d.ContentType != contentType {
		headers[messaging.ContentTypeHeader] = d.ContentType
	}
	if d.ContentEncoding != "" {
		headers[messaging.ContentEncodingHeader] = d.ContentEncoding
	}
	key, flaw := keyOf(d)
	var count int64
	if d.Redelivered { // otherwise the sender set the header
		count, _ = d.Headers["x-delivery-count"].(int64)
	}
	return messaging.Delivery{
		ID: d.MessageId, Type: cmp.Or(d.Type, d.RoutingKey), Key: key, Flaw: flaw, Payload: d.Body, Headers: headers,
		Count: count, Death: deathOf(d.Headers),
	}
}

// keyOf returns the key of a delivery, or a flaw if the key is invalid or unreadable. Such a delivery must not pass as
// one without a key: its order would be lost.
func keyOf(d *amqp.Delivery) (key, flaw string) {
	if reason := Unreadable(d.Headers); reason != "" {
		return "", "the headers cannot be read: " + reason
	}
	value, given := d.Headers[keyHeader]
	if key, ok := value.(string); ok || !given { // always true for our own relay
		return key, ""
	}
	key, ok := plainText(value)
	if !ok {
		const cure = "send a string, an integer, a boolean, or UTF-8 bytes"
		return "", fmt.Sprintf("header %s is %s and cannot be a key: %s", keyHeader, kindOf(value), cure)
	}
	return key, ""
}

// deathOf describes what the broker records when it moves a message to another queue.
func deathOf(headers amqp.Table) string {
	deaths, _ := headers["x-death"].([]any)
	if len(deaths) == 0 {
		return ""
	}
	newest, _ := deaths[0].(amqp.Table)
	return fmt.Sprintf("%v, %v times, from queue %v", newest["reason"], newest["count"], newest["queue"])
}
