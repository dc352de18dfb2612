package main

import (
	"context"
	"slices"
	"strconv"

	"example.com/shop/internal/messaging"
)

// inflating replaces the payload of messages with a header "inflate" by that many bytes. Tests need it because the
// outbox accepts no message that is too large for a broker with default settings.
type inflating struct{ messaging.Publisher }

func (p inflating) Publish(ctx context.Context, messages []messaging.Message) (messaging.Receipt, error) {
	messages = slices.Clone(messages)
	for i, message := range messages {
		size, err := strconv.Atoi(message.Headers["inflate"])
		if err == nil {
			messages[i].Payload = make([]byte, size)
		}
	}
	return p.Publisher.Publish(ctx, messages)
}
