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

// MustBeHeard returns the Config.MustBeHeard of a service whose consumer groups handle the given types. A message must
// be heard in each of these cases:
//
//   - One of the groups handles its type. If no queue takes the message, the group's binding is lost.
//   - Its proto file sets option (outbox.v1.must_be_heard) = true.
//   - No proto file that is linked into this program declares its type: the type may be misspelled.
func MustBeHeard(handled []string) func(messageType string) bool {
	return func(messageType string) bool {
		found, err := protoregistry.GlobalFiles.FindDescriptorByName(protoreflect.FullName(messageType))
		message, declared := found.(protoreflect.MessageDescriptor)
		if err != nil || !declared || slices.Contains(handled, messageType) {
			return true
		}
		options, _ := message.Options().(*descriptorpb.MessageOptions)
		return proto.GetExtension(options, outboxv1.E_MustBeHeard).(bool)
	}
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
