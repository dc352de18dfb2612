package rabbit

import (
	"slices"
	"strings"
	"testing"

	"example.com/shop/internal/dev/testenv"
	"github.com/google/go-cmp/cmp"
	amqp "github.com/rabbitmq/amqp091-go"
)

func TestDeclare(t *testing.T) {
	t.Parallel()

	t.Run("IsIdempotent", func(t *testing.T) {
		t.Parallel()
		ch := raw(t, testenv.AMQP(t))
		for range 3 {
			if err := topology.declare(ch); err != nil {
				t.Fatal(err)
			}
		}
	})

	t.Run("SetsAllArgumentsExplicitly", func(t *testing.T) {
		t.Parallel()
		url, _ := setUp(t)
		operator := testenv.Management(t, url)
		want := map[string]map[string]any{
			queue: {
				"x-queue-type": "quorum", "x-single-active-consumer": true, "x-delivery-limit": 20.0,
				"x-overflow": "reject-publish", "x-dead-letter-exchange": "",
				"x-dead-letter-routing-key": queue + ".dead", "x-dead-letter-strategy": "at-least-once",
			},
			queue + ".dead": {"x-queue-type": "quorum", "x-delivery-limit": 1e6, "x-overflow": "reject-publish"},
		}
		for name, arguments := range want {
			state, ok := operator.Queue(name)
			if !ok || !state.Durable || state.Type != "quorum" {
				t.Errorf("%s: exists %t, durable %t, type %s", name, ok, state.Durable, state.Type)
			}
			if diff := cmp.Diff(arguments, state.Arguments); diff != "" {
				t.Errorf("%s: %s", name, diff)
			}
		}
	})

	t.Run("NamesAQueueWithOtherArgumentsAndLeavesItUnchanged", func(t *testing.T) {
		t.Parallel()
		url := testenv.AMQP(t)
		declareFull(t, raw(t, url), 5)
		err := topology.declare(raw(t, url))
		const want = "queue " + queue + " exists with other arguments; empty and delete it"
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v", err)
		}
		if _, err := newPublisher(t, PublisherConfig{URL: url}).Publish(t.Context(), texts(0, 1)); err == nil {
			t.Error("published to a topology with other arguments")
		}
	})

	t.Run("BindsEachQueueToItsTypesOnly", func(t *testing.T) {
		t.Parallel()
		url := testenv.AMQP(t)
		both := Topology{Exchange: exchange, Queues: []Queue{
			{Name: "all", Types: []string{"google.protobuf.StringValue", "google.protobuf.Int64Value"}},
			{Name: "numbers", Types: []string{"google.protobuf.Int64Value"}},
		}}
		p := newPublisher(t, PublisherConfig{URL: url, Topology: both})
		mustPublish(t, p, text("", "a"), number(1))
		if all, numbers := len(take(t, url, "all")), len(take(t, url, "numbers")); all != 2 || numbers != 1 {
			t.Errorf("%d and %d messages, want 2 and 1", all, numbers)
		}
	})

	t.Run("AReplayToOneQueueReachesNoOther", func(t *testing.T) {
		t.Parallel()
		url := testenv.AMQP(t)
		both := Topology{Exchange: exchange, Queues: []Queue{
			{Name: "other", Types: []string{"google.protobuf.StringValue"}},
			{Name: "target", Types: []string{"google.protobuf.StringValue"}},
		}}
		p := newPublisher(t, PublisherConfig{URL: url, Topology: both, Queue: "target"})
		mustPublish(t, p, text("k", "a"))
		replayed := take(t, url, "target")
		if other := take(t, url, "other"); len(other) != 0 || len(replayed) != 1 {
			t.Fatalf("%d and %d messages, want 0 and 1", len(other), len(replayed))
		}
		if d := decode(&replayed[0]); d.Type != "google.protobuf.StringValue" || d.Key != "k" {
			t.Errorf("got %+v", d)
		}
	})

	t.Run("CompareChangesNothing", func(t *testing.T) {
		t.Parallel()
		url := testenv.AMQP(t)
		for range 2 {
			missing, differing, err := topology.Compare(t.Context(), url)
			want := []string{"there is no queue " + queue, "there is no queue " + DeadQueue(queue)}
			if err != nil || !slices.Equal(missing, want) || differing != nil {
				t.Fatalf("nothing declared: %q, %q, %v", missing, differing, err)
			}
		}
		if err := topology.declare(raw(t, url)); err != nil {
			t.Fatal(err)
		}
		if missing, differing, err := topology.Compare(t.Context(), url); err != nil || len(missing)+
			len(differing) != 0 {
			t.Errorf("all declared: %q, %q, %v", missing, differing, err)
		}
		url = testenv.AMQP(t)
		declareFull(t, raw(t, url), 5)
		_, differing, err := topology.Compare(t.Context(), url)
		if err != nil || len(differing) != 1 || !strings.Contains(differing[0], "exists with other arguments") {
			t.Errorf("other arguments: %q, %v", differing, err)
		}
		if version, err := Version(t.Context(), url); err != nil || !strings.HasPrefix(version, "RabbitMQ ") {
			t.Errorf("version is %q, %v", version, err)
		}
	})

	t.Run("MessagesThatTheBrokerGivesUpMoveToTheDeadQueue", func(t *testing.T) {
		t.Parallel()
		url, p := setUp(t)
		mustPublish(t, p, texts(0, 1)...)
		source, err := raw(t, url).Consume(queue, "", false, false, false, false, nil)
		if err != nil {
			t.Fatal(err)
		}
		for range deliveryLimit + 1 {
			delivery := receive(t, source)
			// Reject, because since 4.3 a nack does not count against the message.
			if err := delivery.Reject(true); err != nil {
				t.Fatal(err)
			}
		}
		dead, err := raw(t, url).Consume(DeadQueue(queue), "", true, false, false, false, nil)
		if err != nil {
			t.Fatal(err)
		}
		got := receive[amqp.Delivery](t, dead)
		if text := textOf(t, got.Body); text != "0" {
			t.Errorf("got %s", text)
		}
		if death := decode(&got).Death; death != "delivery_limit, 1 times, from queue "+queue {
			t.Errorf("death is %q", death)
		}
	})
}
