package outbox

import (
	"context"
	"log/slog"
	"slices"
	"sync"
	"time"

	outboxv1 "example.com/shop/internal/gen/outbox/v1"
	"example.com/shop/internal/messaging"
	"golang.org/x/time/rate"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/descriptorpb"
)

// mustBeHeard reports whether a message of a type becomes a dead letter if no queue takes it:
//
//   - One of the service's own groups handles the type, so the group's binding is lost.
//   - The type's proto file sets option (outbox.v1.must_be_heard) = true.
//   - No proto file that is linked into this program declares the type: it may be misspelled.
//   - Handled is nil.
func (c Config) mustBeHeard(messageType string) bool {
	found, err := protoregistry.GlobalFiles.FindDescriptorByName(protoreflect.FullName(messageType))
	message, declared := found.(protoreflect.MessageDescriptor)
	if c.Handled == nil || err != nil || !declared || slices.Contains(c.Handled, messageType) {
		return true
	}
	options, _ := message.Options().(*descriptorpb.MessageOptions)
	return proto.GetExtension(options, outboxv1.E_MustBeHeard).(bool)
}

// unheardLogInterval is the least time between two log lines about unheard messages of one type.
const unheardLogInterval = time.Minute

// unheard logs messages that no queue took and none had to take.
type unheard struct {
	mu    sync.Mutex
	types map[string]*rate.Sometimes // declared types only, so their number is bounded
}

// log logs the message unless one of its type was logged less than unheardLogInterval ago.
func (u *unheard) log(ctx context.Context, m messaging.Message) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.types == nil {
		u.types = map[string]*rate.Sometimes{}
	}
	if u.types[m.Type] == nil {
		u.types[m.Type] = &rate.Sometimes{Interval: unheardLogInterval}
	}
	u.types[m.Type].Do(func() {
		slog.InfoContext(traceOf(ctx, m.Headers), "message has no subscriber; a replay can publish it again",
			"message_id", m.ID, "type", m.Type)
	})
}
