package messaging

// Delivery is one copy of a message as the broker handed it over. Nothing in it has been checked: the broker is not
// trusted to hold only what our own relay sent.
type Delivery struct {
	// ID is the AMQP message_id, "" if the sender set none.
	ID string
	// Type is the AMQP type property, or the routing key where a sender set no type.
	Type string
	// Key is the ordering key, "" for none.
	Key string
	// Flaw says what of the delivery cannot be read, "" if all of it can. Such a delivery is not applied but kept as a
	// malformed dead letter.
	Flaw    string
	Payload []byte
	// Headers are the sender's, as text whatever type they had. ContentTypeHeader and ContentEncodingHeader are among them
	// if the sender says that the payload is something else than plain protobuf.
	Headers map[string]string
	// Count is how often the broker handed this copy out before without getting an ack: 0 the first time.
	Count int64
	// Death says why the broker gave it up, for a delivery from the queue where it puts such.
	Death string
}
