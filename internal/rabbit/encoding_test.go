package rabbit

import (
	"errors"
	"testing"
	"time"

	"example.com/shop/internal/messaging"
	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	amqp "github.com/rabbitmq/amqp091-go"
)

func TestHeadersOfTheSenderAreNoProperties(t *testing.T) {
	t.Parallel()
	url, p := setUp(t)
	m := text("the key", "the text")
	m.CreatedAt = time.Unix(1_700_000_000, 0)
	m.Headers = map[string]string{
		"cc": "elsewhere", "bcc": "elsewhere", "expiration": "1", "user-id": "nobody", "reply-to": "elsewhere",
		"priority": "9", "delivery-mode": "1", "message-id": "other", "type": "other", "content-type": "other",
		"content-encoding": "gzip", "correlation-id": "1", "timestamp": "1", "app-id": "other",
	}
	if err := m.Validate(); err != nil {
		t.Fatal(err)
	}
	mustPublish(t, p, m)
	want := amqp.Delivery{
		MessageId: m.ID.String(), Type: m.Type, ContentType: "application/protobuf", DeliveryMode: amqp.Persistent,
		Timestamp: m.CreatedAt, Exchange: exchange, RoutingKey: m.Type, Body: m.Payload, Headers: amqp.Table{},
	}
	for name, value := range m.Headers {
		want.Headers[name] = value
	}
	want.Headers[keyHeader] = m.Key
	got := take(t, url, queue)
	// Compare all fields except those of the transport, so that properties added by later library versions are included.
	transport := cmpopts.IgnoreFields(amqp.Delivery{}, "Acknowledger", "ConsumerTag", "DeliveryTag", "MessageCount")
	if diff := cmp.Diff([]amqp.Delivery{want}, got, transport); diff != "" {
		t.Error(diff)
	}
}

func TestAHeaderCannotSetTheKey(t *testing.T) {
	t.Parallel()
	m := text("", "a")
	m.Headers = map[string]string{keyHeader: "forged"}
	if headers := encode(m).Headers; len(headers) > 0 {
		t.Errorf("headers %v", headers)
	}
}

func TestHeadersThatRouteAreRefused(t *testing.T) {
	t.Parallel()
	for _, name := range []string{"CC", "BCC"} {
		m := text("", "a")
		m.Headers = map[string]string{name: "elsewhere"}
		if err := m.Validate(); !errors.Is(err, messaging.ErrInvalid) {
			t.Errorf("%s: got %v", name, err)
		}
	}
}
