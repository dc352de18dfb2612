package messaging

import (
	"context"
	"errors"
)

// Publisher sends messages to the broker in order. It belongs to one goroutine.
type Publisher interface {
	// Publish writes messages in order, without waiting for the broker's verdict. Several calls may be under way;
	// their receipts are to be waited for in the same order. An error means that the connection is gone and that the fate of
	// everything without a verdict, of earlier calls too, is unknown: publish it again.
	Publish(ctx context.Context, messages []Message) (Receipt, error)
	// Close ends the connection. What has no verdict stays unknown.
	Close() error
}

// Receipt stands for messages that were written and have no verdict yet.
type Receipt interface {
	// Wait returns the broker's verdict on each message: nil when every queue that it was routed to has it safely, else an
	// error that wraps one of the errors below. It ends at the publisher's own deadline at the latest. If ctx ends it, the verdicts that are
	// missing wrap ErrUnknown and ctx's error, and it may be called again; the deadline goes on meanwhile.
	Wait(ctx context.Context) []error
}

var (
	// ErrReturned: no queue wants the message. The broker acks it as well, so only the return tells.
	ErrReturned = errors.New("returned by the broker")
	// ErrRefused: the broker closed the channel over something that was published. Which message it was is certain only
	// if it was published alone; everything else on the channel is unknown.
	ErrRefused = errors.New("refused by the broker")
	// ErrNacked: the broker could not take responsibility. It may do so later.
	ErrNacked = errors.New("nacked by the broker")
	// ErrUnknown: the connection ended or the deadline passed before a verdict came. The broker may have the message or not.
	ErrUnknown = errors.New("outcome unknown")
)
