package inbox

import (
	"context"
	"fmt"
	"maps"
	"slices"

	"example.com/shop/internal/bounds"
	"example.com/shop/internal/deadletter"
	"example.com/shop/internal/messaging"
	"github.com/jackc/pgx/v5"
	"google.golang.org/protobuf/proto"
)

// Group is a consumer group: a name, and a handler for each message type that it consumes. Its name is part of every
// inbox row, so a renamed group starts from scratch.
type Group struct {
	name     string
	handlers map[string]handler
}

// handler decodes the payload of a message and runs on it.
type handler func(ctx context.Context, tx pgx.Tx, delivery messaging.Delivery) error

// NewGroup makes a Group without handlers.
func NewGroup(name string) *Group {
	return &Group{name: name, handlers: map[string]handler{}}
}

// Name returns the group's name.
func (g *Group) Name() string { return g.name }

// Types returns the message types that the group handles, sorted. Its queue is bound to exactly these types.
func (g *Group) Types() []string { return slices.Sorted(maps.Keys(g.handlers)) }

// Handle registers fn for messages of the protobuf type M. It panics if M has a handler already.
//
// fn runs in the transaction that records the message as taken: its writes through tx, including outbox.Insert, are
// committed once or not at all. Its effects elsewhere (mail, HTTP) may happen more than once: pass on the message's ID
// from FromContext as idempotency key, so that the receiver can absorb repeats. An error marked by messaging.Permanent
// makes the message a dead letter. After any other error the message is retried later, before any other message of its
// key. fn may run several times before one run is committed.
func Handle[M proto.Message](g *Group, fn func(ctx context.Context, tx pgx.Tx, message M) error) {
	var zero M
	kind := zero.ProtoReflect().Type()
	name := string(kind.Descriptor().FullName())
	if _, taken := g.handlers[name]; taken {
		panic(fmt.Sprintf("inbox: group %s has two handlers for %s", g.name, name))
	}
	g.handlers[name] = func(ctx context.Context, tx pgx.Tx, delivery messaging.Delivery) error {
		message := kind.New().Interface().(M)
		if err := bounds.Unmarshal(delivery.Payload, message); err != nil {
			return &rejection{deadletter.Undecodable, fmt.Errorf("decode %s%s: %w", name, declared(delivery.Headers),
				err)}
		}
		return fn(ctx, tx, message)
	}
}

// handle runs the handler for a delivery's type.
func (g *Group) handle(ctx context.Context, tx pgx.Tx, delivery messaging.Delivery) error {
	handler, ok := g.handlers[delivery.Type]
	if !ok {
		return &rejection{deadletter.UnknownType, fmt.Errorf("group %s has no handler for type %q", g.name,
			delivery.Type)}
	}
	return handler(context.WithValue(ctx, deliveryKey{}, delivery), tx, delivery)
}

type deliveryKey struct{}

// FromContext returns the message that a handler runs on: its ID, type, key, payload and headers. ok is false outside
// of a handler. The ID is the same in every run of every group: after retries, and in copies, replays and redrives. It
// is "" only if the sender set none and an operator redrove the message. The caller must not change the headers.
func FromContext(ctx context.Context) (delivery messaging.Delivery, ok bool) {
	delivery, ok = ctx.Value(deliveryKey{}).(messaging.Delivery)
	return delivery, ok
}

// declared returns what the sender says about the payload, if anything.
func declared(headers map[string]string) (text string) {
	for _, name := range []string{messaging.ContentTypeHeader, messaging.ContentEncodingHeader} {
		if value, given := headers[name]; given {
			text += fmt.Sprintf(", sent with %s %q", name, value)
		}
	}
	return text
}

// rejection is an error that no retry can fix, with its reason.
type rejection struct {
	reason deadletter.Reason
	error
}

func (r *rejection) Unwrap() error { return r.error }
