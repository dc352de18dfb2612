package outbox

import (
	"fmt"
	"testing"

	"example.com/shop/internal/dev/testenv"
	outboxv1 "example.com/shop/internal/gen/outbox/v1"
	"example.com/shop/internal/messaging"
	sdk "go.opentelemetry.io/otel/sdk/metric"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/descriptorpb"
)

func TestMustBeHeard(t *testing.T) {
	required := &descriptorpb.MessageOptions{}
	proto.SetExtension(required, outboxv1.E_MustBeHeard, true)
	file, err := protodesc.NewFile(&descriptorpb.FileDescriptorProto{
		Name: proto.String("heard/v1/events.proto"), Package: proto.String("heard.v1"), Syntax: proto.String("proto3"),
		MessageType: []*descriptorpb.DescriptorProto{
			{Name: proto.String("Required"), Options: required},
			{Name: proto.String("Optional")},
			{Name: proto.String("Handled")},
		},
		EnumType: []*descriptorpb.EnumDescriptorProto{{
			Name:  proto.String("Kind"),
			Value: []*descriptorpb.EnumValueDescriptorProto{{Name: proto.String("ZERO"), Number: proto.Int32(0)}},
		}},
	}, nil)
	if err == nil {
		err = protoregistry.GlobalFiles.RegisterFile(file)
	}
	if err != nil {
		t.Fatal(err)
	}
	mustBeHeard := Config{Handled: []string{"heard.v1.Handled"}}.mustBeHeard
	for name, want := range map[string]bool{
		"heard.v1.Required": true, "heard.v1.Handled": true, "heard.v1.Optional": false,
		"heard.v1.Misspelled": true, "heard.v1.Kind": true, "": true, "not a name": true,
	} {
		if got := mustBeHeard(name); got != want {
			t.Errorf("%q: got %t, want %t", name, got, want)
		}
	}
}

// A message that no queue takes and none needs to take is delivered, in the same page as others and in any place.
func TestUnheardMessagesAreDelivered(t *testing.T) {
	t.Parallel()
	db := testenv.Postgres(t)
	fillProbes(t, db, 20)
	reader := sdk.NewManualReader()
	b := newBroker(17)
	b.verdict = func(text string, _ []string) error {
		if text == "m000" || text == "m007" || text == "m019" {
			return fmt.Errorf("%w: 312 NO_ROUTE", messaging.ErrReturned)
		}
		return nil
	}
	stop := start(t, db, b, Config{
		PageRows: 5, Handled: []string{},
		MeterProvider: sdk.NewMeterProvider(sdk.WithReader(reader)),
	})
	await(t, "the others", b.complete)
	stop()
	letters, published, inCursor := parked(t, db)
	equal(t, "dead letters", len(letters), 0)
	equal(t, "published, parked", []int{published, inCursor}, []int{20, 0})
	metrics := testenv.Metrics(t, reader)
	equal(t, "unheard", metrics["outbox.unheard{}"], 3.0)
	equal(t, "published", metrics["outbox.published{}"], 20.0)
	count, unroutable := replay(t, db, newBroker(0), ReplayFilter{})
	equal(t, "replayed, unroutable", []int{count, unroutable}, []int{20, 0})
}
