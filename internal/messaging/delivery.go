package messaging

// Delivery is one copy of a message as the broker delivered it. Nothing in it has been checked: the broker may contain
// messages that our own relay did not send.
type Delivery struct {
	// ID is the AMQP message_id, "" if the sender set none.
	ID string
	// Type is the AMQP type property, or the routing key if the sender set no type.
	Type string
	// Key is the ordering key, "" for none.
	Key string
	// Flaw describes the unreadable part of the delivery, "" if there is none. A delivery with a flaw is not applied: it
	// becomes a malformed dead letter.
	Flaw    string
	Payload []byte
	// Headers are the sender's headers, converted to text. They include ContentTypeHeader and ContentEncodingHeader if
	// the sender declares that the payload is not plain protobuf.
	Headers map[string]string
	// Count is how often the broker has already delivered this copy without getting an ack: 0 the first time.
	Count int64
	// Death is the broker's reason for giving up the message. It is set on deliveries from a dead queue.
	Death string
}
