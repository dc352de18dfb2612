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

// applyPolicy makes a policy for all queues, and waits until it is in force on one.
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
			err = errors.New("no policy is in force")
		}
		return err
	})
}

func TestPoliciesThatLoseMessagesAreNamed(t *testing.T) {
	t.Parallel()
	dead := DeadQueue(queue)
	for name, test := range map[string]struct {
		definition settings
		operator   bool
		want       []string // queue, setting, and whether it loses
	}{
		"TTL":           {settings{"message-ttl": 60_000}, false, []string{queue + " message-ttl=60000 false", dead + " message-ttl=60000 true"}},
		"TTLOfOperator": {settings{"message-ttl": 60_000}, true, []string{queue + " message-ttl=60000 false", dead + " message-ttl=60000 true"}},
		"Expires":       {settings{"expires": 3_600_000}, false, []string{queue + " expires=3600000 true", dead + " expires=3600000 true"}},
		"Length":        {settings{"max-length": 9}, false, []string{queue + " max-length=9 false", dead + " max-length=9 false"}},
		"Overflow": {settings{"max-length-bytes": 9, "overflow": "drop-head"}, false, []string{
			queue + " max-length-bytes=9 true", queue + " overflow=drop-head true", dead + " max-length-bytes=9 true", dead + " overflow=drop-head true",
		}},
		"DeliveryLimit": {settings{"delivery-limit": 3}, false, []string{queue + " delivery-limit=3 false", dead + " delivery-limit=3 true"}},
		"HigherLimit":   {settings{"delivery-limit": 50}, false, []string{dead + " delivery-limit=50 true"}},
		"Harmless":      {settings{"overflow": "reject-publish", "dead-letter-exchange": "elsewhere"}, false, nil},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			url, _ := setUp(t)
			if err := topology.Declare(t.Context(), url); err != nil {
				t.Fatal(err)
			}
			if found, err := topology.Policies(t.Context(), testenv.Management(t, url).URL(), url); err != nil || len(found) > 0 {
				t.Fatalf("without a policy: %v, %v", found, err)
			}
			applyPolicy(t, url, queue, test.definition, test.operator)
			found, err := topology.Policies(t.Context(), testenv.Management(t, url).URL(), url)
			if err != nil {
				t.Fatal(err)
			}
			var got []string
			for _, one := range found {
				got = append(got, fmt.Sprint(one.Queue, " ", one.Setting, " ", one.Loses))
				if text := one.String(); one.Policy != "limits" || !strings.Contains(text, one.Queue) || !strings.Contains(text, one.Setting) {
					t.Errorf("it says %q", text)
				}
			}
			if !slices.Equal(got, test.want) {
				t.Errorf("got %q, want %q", got, test.want)
			}
		})
	}
}

func TestPoliciesThatCannotBeLookedAt(t *testing.T) {
	t.Parallel()
	amqpURL := testenv.AMQP(t)
	management, err := url.Parse(testenv.Management(t, amqpURL).URL())
	if err != nil {
		t.Fatal(err)
	}
	stranger := *management
	stranger.User = url.UserPassword("nobody", "hunter2")
	away := stranger
	away.Host = "127.0.0.1:1"
	for name, test := range map[string]struct{ url, want string }{
		"NoURL":   {"hunter2", "not a URL"},
		"Refused": {stranger.String(), "401 Unauthorized to user nobody"},
		"Away":    {away.String(), "refused"},
	} {
		_, err := topology.Policies(t.Context(), test.url, amqpURL)
		if err == nil || !strings.Contains(err.Error(), test.want) || strings.Contains(err.Error(), "hunter2") {
			t.Errorf("%s: %v", name, err)
		}
	}
	management.User = nil // then that of AMQP_URL
	if found, err := topology.Policies(t.Context(), management.String(), amqpURL); err != nil || len(found) != 0 {
		t.Errorf("no queues: %v, %v", found, err)
	}
}

// Our queues have explicit arguments for all that matters; what follows is how much these help against a policy. Of
// overflow, the policy's counts; of limits, the lower one; of what is about dead letters, the argument.
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

	t.Run("OverflowIsThePolicys", func(t *testing.T) {
		t.Parallel()
		url, p := setUp(t)
		applyPolicy(t, url, queue, settings{"max-length": 1, "overflow": "drop-head"}, false)
		mustPublish(t, p, texts(0, 20)...) // none is refused, although the queue's argument says so
		awaitCount(t, url, queue, 1)
	})

	t.Run("TheLowerLimitCounts", func(t *testing.T) {
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
		if _, err := raw(t, url).QueueDeclare("elsewhere", true, false, false, false, amqp.Table{"x-queue-type": "quorum"}); err != nil {
			t.Fatal(err)
		}
		m := testenv.Management(t, url)
		m.Policy("limits", "^"+queue+"$", settings{"message-ttl": 1, "dead-letter-routing-key": "elsewhere"}, false)
		expire(t, url, p, func(depth func(string) int) bool { return depth(DeadQueue(queue)) == 1 && depth("elsewhere") == 0 })
	})
}

// expire publishes a message that expires, and waits for what becomes of it. A message that came before the policy was
// in force stays, without a TTL, so then it is done again.
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
	const tries = 10
	for range tries {
		for _, name := range []string{queue, DeadQueue(queue)} {
			if _, err := ch.QueuePurge(name, false); err != nil {
				t.Fatal(err)
			}
		}
		mustPublish(t, p, texts(0, 1)...)
		for looked := time.Now(); time.Since(looked) < patience/tries; {
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
