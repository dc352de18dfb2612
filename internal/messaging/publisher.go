package messaging

import (
	"context"
	"errors"
)

// Publisher sends messages to the broker in order. Only one goroutine may use it.
type Publisher interface {
	// Publish writes messages in order, without waiting for the broker's verdict. Several receipts may be outstanding;
	// the caller must wait for them in the same order. An error means that the connection is lost, and that the outcome
	// of every message without a verdict, those of earlier calls included, is unknown: publish them again.
	Publish(ctx context.Context, messages []Message) (Receipt, error)
	// Close ends the connection. The outcome of messages without a verdict stays unknown.
	Close() error
}

// Receipt represents messages that were written and have no verdict yet.
type Receipt interface {
	// Wait returns the broker's verdict on each message: nil if every queue that it was routed to has stored it safely,
	// otherwise an error that wraps one of the errors below. It returns at the publisher's own deadline at the latest. If
	// ctx ends first, the missing verdicts wrap ErrUnknown and ctx's error, and Wait may be called again; the deadline
	// keeps running in between.
	Wait(ctx context.Context) []error
}

var (
	// ErrReturned means that no queue takes the message. The broker acks it as well, so only the return shows this.
	ErrReturned = errors.New("returned by the broker")
	// ErrRefused means that the broker closed the channel because of a published message. It is certain which message
	// caused this only if the message was published alone. The outcome of everything else on the channel is unknown.
	ErrRefused = errors.New("refused by the broker")
	// ErrNacked means that the broker could not take responsibility for the message. It may do so later.
	ErrNacked = errors.New("nacked by the broker")
	// ErrUnknown means that the connection ended or the deadline passed before a verdict arrived. The broker may or may
	// not have the message.
	ErrUnknown = errors.New("outcome unknown")
)
