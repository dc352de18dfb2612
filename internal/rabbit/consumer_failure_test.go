package rabbit

import (
	"bytes"
	"context"
	"fmt"
	"strconv"
	"strings"
	"testing"
	"time"

	"example.com/shop/internal/dev/testenv"
	"example.com/shop/internal/messaging"
	"github.com/google/go-cmp/cmp"
	amqp "github.com/rabbitmq/amqp091-go"
)

func TestConsumeWhenTheConnectionFails(t *testing.T) {
	t.Parallel()

	t.Run("WhatWasNotAckedComesAgainAndIsCounted", func(t *testing.T) {
		t.Parallel()
		url, p := setUp(t)
		proxy, through := testenv.ProxyURL(t, url)
		mustPublish(t, p, texts(0, 3)...)
		gate := newGated()
		consume(t, ConsumerConfig{URL: through, Batch: 1}, gate.handle)
		for count := range int64(3) {
			got := receive(t, gate.begun)
			if diff := cmp.Diff([]string{"0"}, valuesOf(t, got)); diff != "" {
				t.Error(diff)
			}
			if got[0].Count != count {
				t.Errorf("count %d, want %d", got[0].Count, count)
			}
			if count < 2 && proxy.Cut() == 0 {
				t.Fatal("no connection to cut")
			}
		}
		close(gate.release)
		gate.begun.next(t, 2)
	})

	t.Run("ADeletedQueueIsRedeclared", func(t *testing.T) {
		t.Parallel()
		url, p := setUp(t)
		got := make(recorder, 100)
		consume(t, ConsumerConfig{URL: url}, got.handle)
		mustPublish(t, p, texts(0, 1)...)
		got.next(t, 1)
		testenv.Management(t, url).DeleteQueue(queue)
		message := texts(1, 1)
		// The message is returned until the queue exists again.
		testenv.Eventually(t, patience, func() error { return wait(t, publish(t, p, message...))[0] })
		if diff := cmp.Diff([]string{"1"}, valuesOf(t, got.next(t, 1))); diff != "" {
			t.Error(diff)
		}
	})

	t.Run("ItReconnectsAfterAnOperatorClosesConnections", func(t *testing.T) {
		t.Parallel()
		url, p := setUp(t)
		got := make(recorder, 100)
		consume(t, ConsumerConfig{URL: url}, got.handle)
		mustPublish(t, p, texts(0, 1)...)
		got.next(t, 1)
		_ = p.Close()
		testenv.Management(t, url).CloseConnections()
		mustPublish(t, p, texts(1, 1)...)
		for last := ""; last != "1"; { // the first message is redelivered if its ack was not sent yet
			for _, delivery := range receive(t, got) {
				last = textOf(t, delivery.Payload)
			}
		}
	})
}

// A message with headers that the library cannot read arrives with a flaw instead of its headers, and disturbs no other
// message.
func TestAMessageThatCannotBeReadHarmsNoOther(t *testing.T) {
	t.Parallel()
	url, p := setUp(t)
	mustPublish(t, p, texts(0, 10)...)
	ch := raw(t, url)
	if err := ch.Confirm(false); err != nil {
		t.Fatal(err)
	}
	list := func(n int) []any {
		long := make([]any, n)
		for i := range long {
			long[i] = ""
		}
		return long
	}
	var deep any = "end"
	for range maxDepth + 1 {
		deep = []any{deep}
	}
	wide := amqp.Table{}
	for i := range maxElements + 1 {
		wide[strconv.Itoa(i)] = nil
	}
	tooLong := list(maxElements + 1)
	unreadable := []amqp.Table{{"x": tooLong}, {"x": deep}, wide, {"x": amqp.Table{"y": list(9000)}}}
	readable := []amqp.Table{{"x": list(maxElements)}, {"x": deep.([]any)[0]}}
	for _, headers := range append(unreadable, readable...) {
		confirm, err := ch.PublishWithDeferredConfirm("", queue, true, false, amqp.Publishing{
			Headers: headers, ContentType: "text/plain", ContentEncoding: "plain",
			MessageId: "foreign", Type: "some.Type", Body: []byte("kept"),
		})
		if err != nil {
			t.Fatal(err)
		}
		if acked, err := confirm.WaitContext(t.Context()); err != nil || !acked {
			t.Fatalf("acked %t, %v", acked, err)
		}
	}
	mustPublish(t, p, texts(10, 10)...)
	got := make(chan messaging.Delivery, 100)
	consume(t, ConsumerConfig{URL: url}, func(_ context.Context, batch []messaging.Delivery) error {
		for _, delivery := range batch {
			got <- delivery
		}
		return nil
	})
	flawed := 0
	for range 20 + len(unreadable) + len(readable) {
		delivery := receive(t, got)
		if delivery.Count > 0 {
			t.Errorf("%s was delivered %d times before", delivery.ID, delivery.Count)
		}
		if delivery.ID != "foreign" {
			continue
		}
		if delivery.Type != "some.Type" || string(delivery.Payload) != "kept" {
			t.Errorf("got %+v", delivery)
		}
		if delivery.Flaw != "" {
			flawed++
		}
	}
	if flawed != len(unreadable) {
		t.Errorf("%d messages have a flaw, want %d", flawed, len(unreadable))
	}
	ready(t, url, 0)
	awaitCount(t, url, DeadQueue(queue), 0)
}

func TestConsumeForeignMessages(t *testing.T) {
	t.Parallel()
	url, _ := setUp(t)
	ch := raw(t, url)
	nested := amqp.Table{"list": []any{int32(1), amqp.Table{"deep": []byte{0xff}}}}
	long := strings.Repeat("x", 100_000)
	large := bytes.Repeat([]byte{1}, 20<<10)
	cases := map[string]struct {
		sent amqp.Publishing
		want messaging.Delivery
	}{
		"NoProperties": {amqp.Publishing{}, messaging.Delivery{}},
		"NoIDButAType": {amqp.Publishing{Type: "some.Type"}, messaging.Delivery{Type: "some.Type"}},
		"InvalidText": {
			amqp.Publishing{MessageId: "\xff\x00", Type: "\xfe"},
			messaging.Delivery{ID: "\xff\x00", Type: "\xfe"},
		},
		"ForeignHeaders": {
			amqp.Publishing{Headers: amqp.Table{
				"int": int64(1), "bool": true, "time": time.Unix(1, 0), "nothing": nil, "float": 1.5, "nested": nested,
				"bytes": []byte("b"), "text": "kept", "decimal": amqp.Decimal{Scale: 1, Value: 2},
			}},
			messaging.Delivery{Headers: map[string]string{
				"int": "1", "bool": "true", "time": "1970-01-01T00:00:01Z", "nothing": "", "float": "1.5",
				"nested": `{"list":[1,{"deep":"/w=="}]}`, "bytes": "b", "text": "kept", "decimal": "2e-1",
			}},
		},
		"AKeyThatIsANumber": {amqp.Publishing{Headers: amqp.Table{keyHeader: int32(7)}}, messaging.Delivery{Key: "7"}},
		"AKeyThatIsATable": {amqp.Publishing{Headers: amqp.Table{keyHeader: nested}}, messaging.Delivery{
			Flaw: "header message-key is a table and cannot be a key: " +
				"send a string, an integer, a boolean, or UTF-8 bytes",
		}},
		"AForgedCount": {amqp.Publishing{Headers: amqp.Table{"x-delivery-count": int64(99)}}, messaging.Delivery{}},
		"ACountThatIsText": {
			amqp.Publishing{Headers: amqp.Table{"x-delivery-count": "99", "x-death": "me"}},
			messaging.Delivery{},
		},
		"AHugeHeader": {
			amqp.Publishing{Headers: amqp.Table{"long": long}},
			messaging.Delivery{Headers: map[string]string{"long": long}},
		},
		"AForeignEncoding": {
			amqp.Publishing{ContentType: "text/plain", ContentEncoding: "gzip"},
			messaging.Delivery{Headers: map[string]string{"content-type": "text/plain", "content-encoding": "gzip"}},
		},
		"ALargePayload":     {amqp.Publishing{Body: large}, messaging.Delivery{Payload: large}},
		"AThousandHeaders":  {amqp.Publishing{Headers: manyHeaders}, messaging.Delivery{Headers: manyTexts}},
		"TransientDelivery": {amqp.Publishing{DeliveryMode: amqp.Transient, Priority: 9}, messaging.Delivery{}},
	}
	got := make(recorder)
	consume(t, ConsumerConfig{URL: url}, got.handle)
	for name, tc := range cases {
		if err := ch.Publish(exchange, topology.Queues[0].Types[0], false, false, tc.sent); err != nil {
			t.Fatal(err)
		}
		delivery := got.next(t, 1)[0]
		if tc.want.Type == "" {
			tc.want.Type = topology.Queues[0].Types[0] // the routing key is used instead
		}
		if tc.want.Headers == nil {
			tc.want.Headers = map[string]string{}
		}
		if tc.want.Payload == nil {
			tc.want.Payload = []byte{}
		}
		if diff := cmp.Diff(tc.want, delivery); diff != "" {
			t.Errorf("%s: %.1000s", name, diff)
		}
	}
}

var manyHeaders, manyTexts = func() (amqp.Table, map[string]string) {
	headers, texts := amqp.Table{}, map[string]string{}
	for i := range 1000 {
		name := fmt.Sprint("header-", i)
		headers[name], texts[name] = "value", "value"
	}
	return headers, texts
}()
