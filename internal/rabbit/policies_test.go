package rabbit

import (
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"example.com/shop/internal/dev/testenv"
	"example.com/shop/internal/messaging"
	amqp "github.com/rabbitmq/amqp091-go"
)

type settings = map[string]any

// applyPolicy creates a policy for all queues, and waits until it is in effect on the given queue.
func applyPolicy(t *testing.T, url, queue string, definition settings, operator bool) {
	t.Helper()
	m := testenv.Management(t, url)
	m.Policy("limits", ".*", definition, operator)
	api, err := newManagementAPI(m.URL(), url)
	if err != nil {
		t.Fatal(err)
	}
	defer api.client.CloseIdleConnections()
	testenv.Eventually(t, patience, func() error {
		state, err := api.queue(t.Context(), queue)
		if err == nil && state.Policy != "limits" && state.OperatorPolicy != "limits" {
			err = errors.New("no policy is in effect")
		}
		return err
	})
}

func TestPoliciesThatLoseMessagesAreNamed(t *testing.T) {
	t.Parallel()
	dead := DeadQueue(queue)
	ttl := []string{queue + " message-ttl=60000 false", dead + " message-ttl=60000 true"}
	for name, test := range map[string]struct {
		definition settings
		operator   bool
		want       []string // queue, setting, and whether messages can be lost
	}{
		"TTL":           {settings{"message-ttl": 60_000}, false, ttl},
		"TTLOfOperator": {settings{"message-ttl": 60_000}, true, ttl},
		"Expires": {settings{"expires": 3_600_000}, false, []string{
			queue + " expires=3600000 true", dead + " expires=3600000 true",
		}},
		"Length": {settings{"max-length": 9}, false, []string{
			queue + " max-length=9 false", dead + " max-length=9 false",
		}},
		"Overflow": {settings{"max-length-bytes": 9, "overflow": "drop-head"}, false, []string{
			queue + " max-length-bytes=9 true", queue + " overflow=drop-head true",
			dead + " max-length-bytes=9 true", dead + " overflow=drop-head true",
		}},
		"DeliveryLimit": {settings{"delivery-limit": 3}, false, []string{
			queue + " delivery-limit=3 false", dead + " delivery-limit=3 true",
		}},
		"HigherLimit": {settings{"delivery-limit": 50}, false, []string{dead + " delivery-limit=50 true"}},
		"Harmless":    {settings{"overflow": "reject-publish", "dead-letter-exchange": "elsewhere"}, false, nil},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			url, _ := setUp(t)
			if err := topology.Declare(t.Context(), url); err != nil {
				t.Fatal(err)
			}
			managementURL := testenv.Management(t, url).URL()
			if found, err := topology.Policies(t.Context(), managementURL, url); err != nil || len(found) > 0 {
				t.Fatalf("without a policy: %v, %v", found, err)
			}
			applyPolicy(t, url, queue, test.definition, test.operator)
			found, err := topology.Policies(t.Context(), managementURL, url)
			if err != nil {
				t.Fatal(err)
			}
			var got []string
			for _, danger := range found {
				got = append(got, fmt.Sprint(danger.Queue, " ", danger.Setting, " ", danger.Loses))
				text := danger.String()
				if !strings.Contains(text, danger.Queue) || !strings.Contains(text, danger.Setting) {
					t.Errorf("the text is %q, want queue and setting in it", text)
				}
				if danger.Policy != "limits" {
					t.Errorf("the policy is %q, want limits", danger.Policy)
				}
			}
			if !slices.Equal(got, test.want) {
				t.Errorf("got %q, want %q", got, test.want)
			}
		})
	}
}

func TestPoliciesThatCannotBeRead(t *testing.T) {
	t.Parallel()
	amqpURL := testenv.AMQP(t)
	management, err := url.Parse(testenv.Management(t, amqpURL).URL())
	if err != nil {
		t.Fatal(err)
	}
	stranger := *management
	stranger.User = url.UserPassword("nobody", "hunter2")
	unreachable := stranger
	unreachable.Host = "127.0.0.1:1"
	for name, test := range map[string]struct{ url, want string }{
		"NoURL":       {"hunter2", "not an HTTP URL"},
		"Refused":     {stranger.String(), "user nobody with 401 Unauthorized"},
		"Unreachable": {unreachable.String(), "refused"},
	} {
		_, err := topology.Policies(t.Context(), test.url, amqpURL)
		if err == nil || !strings.Contains(err.Error(), test.want) || strings.Contains(err.Error(), "hunter2") {
			t.Errorf("%s: %v", name, err)
		}
	}
	management.User = nil // then the user of AMQP_URL is used
	if found, err := topology.Policies(t.Context(), management.String(), amqpURL); err != nil || len(found) != 0 {
		t.Errorf("no queues: %v, %v", found, err)
	}
}

// TestArgumentsAgainstAPolicy shows how far the explicit arguments of our queues protect against a policy. For
// overflow the policy applies, for limits the lower value, and for dead-letter settings the argument.
func TestArgumentsAgainstAPolicy(t *testing.T) {
	t.Parallel()

	t.Run("ALengthLimitRefusesAndLosesNothing", func(t *testing.T) {
		t.Parallel()
		url, p := setUp(t)
		mustPublish(t, p, texts(0, 1)...)
		applyPolicy(t, url, queue, settings{"max-length": 1}, false)
		testenv.Eventually(t, patience, func() error {
			return nackedOr(wait(t, publish(t, p, texts(1, 1)...))[0])
		})
	})

	t.Run("ThePolicySetsOverflow", func(t *testing.T) {
		t.Parallel()
		url, p := setUp(t)
		applyPolicy(t, url, queue, settings{"max-length": 1, "overflow": "drop-head"}, false)
		mustPublish(t, p, texts(0, 20)...) // none is refused, although the queue's argument is reject-publish
		awaitCount(t, url, queue, 1)
	})

	t.Run("TheLowerLimitApplies", func(t *testing.T) {
		t.Parallel()
		url, _ := setUp(t)
		p := newPublisher(t, PublisherConfig{URL: url, Queue: DeadQueue(queue)})
		mustPublish(t, p, texts(0, 1)...)
		applyPolicy(t, url, DeadQueue(queue), settings{"message-ttl": 1}, false)
		expire(t, url, p, func(depth func(string) int) bool { return depth(DeadQueue(queue)) == 0 })
	})

	t.Run("DeadLettersGoWhereTheArgumentSays", func(t *testing.T) {
		t.Parallel()
		url, p := setUp(t)
		quorum := amqp.Table{"x-queue-type": "quorum"}
		if _, err := raw(t, url).QueueDeclare("elsewhere", true, false, false, false, quorum); err != nil {
			t.Fatal(err)
		}
		m := testenv.Management(t, url)
		m.Policy("limits", "^"+queue+"$", settings{"message-ttl": 1, "dead-letter-routing-key": "elsewhere"}, false)
		expire(t, url, p, func(depth func(string) int) bool {
			return depth(DeadQueue(queue)) == 1 && depth("elsewhere") == 0
		})
	})
}

// expire publishes a message that expires, and waits until done returns true. A message that arrives before the
// policy is in effect has no TTL and stays, so expire tries several times.
func expire(t *testing.T, url string, p *Publisher, done func(depth func(string) int) bool) {
	t.Helper()
	ch := raw(t, url)
	depth := func(name string) int {
		state, err := ch.QueueDeclarePassive(name, true, false, false, false, nil)
		if err != nil {
			t.Fatal(err)
		}
		return state.Messages
	}
	const attempts = 10
	for range attempts {
		for _, name := range []string{queue, DeadQueue(queue)} {
			if _, err := ch.QueuePurge(name, false); err != nil {
				t.Fatal(err)
			}
		}
		mustPublish(t, p, texts(0, 1)...)
		for began := time.Now(); time.Since(began) < patience/attempts; {
			if done(depth) {
				return
			}
		}
	}
	t.Errorf("%d messages in the queue, %d in the dead queue", depth(queue), depth(DeadQueue(queue)))
}

func nackedOr(verdict error) error {
	if errors.Is(verdict, messaging.ErrNacked) {
		return nil
	}
	return fmt.Errorf("not refused: %v", verdict)
}
