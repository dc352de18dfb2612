package main

import (
	"context"
	"slices"
	"strconv"

	"example.com/shop/internal/messaging"
)

// inflating sends messages whose header "inflate" says so with a payload of as many bytes. The outbox takes none that a
// broker with its own defaults refuses, and so no test could have one refused otherwise.
type inflating struct{ messaging.Publisher }

func (p inflating) Publish(ctx context.Context, messages []messaging.Message) (messaging.Receipt, error) {
	messages = slices.Clone(messages)
	for i, one := range messages {
		size, err := strconv.Atoi(one.Headers["inflate"])
		if err == nil {
			messages[i].Payload = make([]byte, size)
		}
	}
	return p.Publisher.Publish(ctx, messages)
}
