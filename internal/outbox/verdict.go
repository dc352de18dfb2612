package outbox

import (
	"context"
	"errors"
	"log/slog"

	"example.com/shop/internal/deadletter"
	"example.com/shop/internal/messaging"
)

// count adds a message with a final verdict to what is settled.
func (r *run) count(ctx context.Context, settled row, reason deadletter.Reason, verdict error) {
	m := settled.message
	switch {
	case verdict == nil:
		r.settled.published++
	case reason == deadletter.Unroutable && !r.mustHear(m.Type):
		r.settled.published++
		r.settled.unheard++
		r.unheard.log(ctx, m)
	default:
		r.settled.parked = append(r.settled.parked, park(ctx, settled, reason, verdict))
	}
	r.settled.topID = max(r.settled.topID, settled.id)
}

// judge reports whether a verdict is final and, if it is final and not nil, the reason to park the message. A refusal
// is final only for a message that was alone on the channel.
func judge(verdict error, alone bool) (reason deadletter.Reason, final bool) {
	switch {
	case verdict == nil:
		return "", true
	case errors.Is(verdict, messaging.ErrInvalid):
		return deadletter.Malformed, true
	case errors.Is(verdict, messaging.ErrReturned):
		return deadletter.Unroutable, true
	case errors.Is(verdict, messaging.ErrRefused) && alone:
		return deadletter.Refused, true
	}
	return "", false
}

func park(ctx context.Context, parked row, reason deadletter.Reason, verdict error) deadletter.Letter {
	m := parked.message
	ctx = traceOf(ctx, m.Headers)
	slog.ErrorContext(ctx, "message parked", "message_id", m.ID, "type", m.Type, "reason", reason, "error", verdict)
	return deadletter.Letter{
		MessageID: m.ID.String(), Type: m.Type, Key: m.Key, Payload: m.Payload, Headers: m.Headers,
		Reason: reason, Error: verdict.Error(), Attempts: 1,
	}
}
