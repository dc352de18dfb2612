package rabbit

import (
	"math"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	amqp "github.com/rabbitmq/amqp091-go"
)

// fieldsOfAMQP contains a value of each type that a header may have on the wire, the text that a delivery gets for
// it, and whether it can be a key. (RabbitMQ refuses NaN.)
var fieldsOfAMQP = map[string]struct {
	value any
	text  string
	key   bool
}{
	"string":        {"order 1", "order 1", true},
	"empty string":  {"", "", true},
	"true":          {true, "true", true},
	"false":         {false, "false", true},
	"byte":          {byte(200), "200", true},
	"int8":          {int8(-7), "-7", true},
	"int16":         {int16(-700), "-700", true},
	"uint16":        {uint16(60_000), "60000", true},
	"int32":         {int32(-70_000), "-70000", true},
	"uint32":        {uint32(4_000_000_000), "4000000000", true},
	"int64":         {int64(math.MinInt64), "-9223372036854775808", true},
	"bytes of text": {[]byte("ключ"), "ключ", true},
	"other bytes":   {[]byte{0xff, 0}, "/wA=", false},
	"float32":       {float32(1.5), "1.5", false},
	"float64":       {2.0, "2", false},
	"decimal":       {amqp.Decimal{Scale: 2, Value: 1250}, "1250e-2", false},
	"time":          {time.Unix(1_700_000_000, 0), "2023-11-14T22:13:20Z", false},
	"void":          {nil, "", false},
	"list":          {[]any{"a", int32(1)}, `["a",1]`, false},
	"table":         {amqp.Table{"a": true}, `{"a":true}`, false},
}

// Messages from foreign publishers arrive through a real broker, which passes on every type. No key is silently
// ignored, and no header is lost.
func TestHeadersOfEveryTypeArrive(t *testing.T) {
	t.Parallel()
	url, _ := setUp(t)
	channel := raw(t, url)
	if err := channel.Confirm(false); err != nil {
		t.Fatal(err)
	}
	for name, field := range fieldsOfAMQP {
		headers := amqp.Table{keyHeader: field.value, "Other": field.value}
		foreign := amqp.Publishing{MessageId: name, DeliveryMode: amqp.Persistent, Headers: headers}
		confirm, err := channel.PublishWithDeferredConfirm("", queue, true, false, foreign)
		if err != nil {
			t.Fatal(err)
		}
		if acked, err := confirm.WaitContext(t.Context()); !acked || err != nil {
			t.Fatalf("%s: acked %t, %v", name, acked, err)
		}
	}
	got := take(t, url, queue)
	if len(got) != len(fieldsOfAMQP) {
		t.Fatalf("%d messages arrived, want %d", len(got), len(fieldsOfAMQP))
	}
	for i := range got {
		d, field := decode(&got[i]), fieldsOfAMQP[got[i].MessageId]
		if want := map[string]string{"Other": field.text}; !cmp.Equal(d.Headers, want) {
			t.Errorf("%s: headers %v, want %v", d.ID, d.Headers, want)
		}
		switch {
		case field.key && (d.Key != field.text || d.Flaw != ""):
			t.Errorf("%s: key %q, flaw %q", d.ID, d.Key, d.Flaw)
		case !field.key && (d.Key != "" || !strings.Contains(d.Flaw, keyHeader)):
			t.Errorf("%s: key %q, flaw %q; it cannot be a key", d.ID, d.Key, d.Flaw)
		}
	}
}

// Deliveries of one key share a lane, whichever type the key header has.
func TestALaneIsChosenByTheKeyAsText(t *testing.T) {
	t.Parallel()
	c := &Consumer{config: ConsumerConfig{Lanes: 1 << 20}}
	lane := func(value any) int {
		return c.laneOf(&amqp.Delivery{Headers: amqp.Table{keyHeader: value}})
	}
	if text, number, bytes := lane("17"), lane(int32(17)), lane([]byte("17")); text != number || text != bytes {
		t.Errorf("got lanes %d, %d and %d, want the same lane", text, number, bytes)
	}
}

func TestThePayloadsLabelIsKeptUnlessItIsOurs(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		sent amqp.Delivery
		want map[string]string
	}{
		"ours": {amqp.Delivery{ContentType: contentType}, map[string]string{}},
		"none": {amqp.Delivery{}, map[string]string{}},
		"JSON": {
			amqp.Delivery{ContentType: "application/json"},
			map[string]string{"content-type": "application/json"},
		},
		"gzip": {
			amqp.Delivery{ContentType: contentType, ContentEncoding: "gzip"},
			map[string]string{"content-encoding": "gzip"},
		},
		"property and header": {
			amqp.Delivery{ContentType: "text/plain", Headers: amqp.Table{"content-type": "a"}},
			map[string]string{"content-type": "text/plain"},
		},
		"header only": {
			amqp.Delivery{ContentType: contentType, Headers: amqp.Table{"content-type": "a"}},
			map[string]string{"content-type": "a"},
		},
	} {
		if got := decode(&test.sent).Headers; !cmp.Equal(got, test.want) {
			t.Errorf("%s: %v, want %v", name, got, test.want)
		}
	}
}
