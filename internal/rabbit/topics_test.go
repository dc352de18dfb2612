package rabbit

import (
	"errors"
	"net/url"
	"slices"
	"strings"
	"testing"

	"example.com/shop/internal/dev/testenv"
	"example.com/shop/internal/messaging"
)

// forged returns a message of another service.
func forged() messaging.Message {
	message := text("k", "forged")
	message.Type = "billing.v1.InvoicePaid"
	return message
}

// A relay can publish the messages of its own packages, and the broker refuses all others. A message of its own that
// the broker refuses is the fault of the permissions, and stays to be published.
func TestARelayPublishesItsOwnMessagesOnly(t *testing.T) {
	t.Parallel()
	admin := testenv.AMQP(t)
	given := topology
	given.Queues = append(given.Queues, Queue{Name: "billing", Types: []string{forged().Type}, Unordered: true})
	given.Packages = []string{"another.v1", "google.protobuf"}
	if err := given.Declare(t.Context(), admin); err != nil {
		t.Fatal(err)
	}
	given.Given = true
	broker := testenv.Management(t, admin)
	login, err := url.Parse(broker.User("", "", "")) // the user is deleted when the test ends
	if err != nil {
		t.Fatal(err)
	}
	password, _ := login.User.Password()
	relay := User{Name: login.User.Username(), Password: password, Permissions: given.PublisherPermissions()}
	if err := MakeUsers(t.Context(), broker.URL(), admin, relay); err != nil {
		t.Fatal(err)
	}
	p := newPublisher(t, PublisherConfig{URL: login.String(), Topology: given})
	mustPublish(t, p, texts(0, 1)...)
	verdicts := wait(t, publish(t, p, text("", "a"), forged(), text("", "b")))
	all(t, verdicts[1:], messaging.ErrRefused, 2)
	if !strings.Contains(verdicts[1].Error(), forged().Type) {
		t.Errorf("the error does not name the type: %v", verdicts[1])
	}
	long := forged()
	long.Type += strings.Repeat("x", messaging.MaxType-len(long.Type)) // the broker cuts its error
	for _, alone := range []messaging.Message{forged(), long} {
		all(t, wait(t, publish(t, p, alone)), messaging.ErrRefused, 1)
	}
	if stolen := broker.Get("billing", 10); len(stolen) != 0 {
		t.Errorf("the other service has %d forged messages", len(stolen))
	}
	mustPublish(t, p, texts(1, 1)...)

	broker.Topics(login.String(), exchange, `^another\.v1\.`, nothing) // as an outdated setup would
	_ = p.Close()
	verdicts = wait(t, publish(t, p, text("", "own")))
	wantUnknown(t, verdicts, 1)
	if !strings.Contains(verdicts[0].Error(), "set the topic permissions of the relay's user") {
		t.Errorf("the error has no cure: %v", verdicts[0])
	}
	if err := MakeUsers(t.Context(), broker.URL(), admin, relay); err != nil {
		t.Fatal(err)
	}
	mustPublish(t, p, texts(2, 1)...)
}

func TestOwnedTypes(t *testing.T) {
	t.Parallel()
	own := Topology{Exchange: exchange, Packages: []string{"trade.v1", "trade.stocks.v1"}}
	if got, want := own.PublisherPermissions().Topics.Write, `^(trade\.v1|trade\.stocks\.v1)\.`; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
	for name, want := range map[string]bool{
		"trade.v1.Sold": true, "trade.v1.Sold.Nested": true, "trade.v1beta.Sold": false,
		"tradexv1.Sold": false, "trade.v1": false, "a.trade.v1.Sold": false, "": false,
	} {
		if got := own.owns(name); got != want {
			t.Errorf("%q: got %t, want %t", name, got, want)
		}
	}
	if everything := topology; !everything.owns("any.v1.Type") || everything.PublisherPermissions().Topics != nil {
		t.Error("a topology without packages limits types")
	}
}

// Users without a topic permission on the exchange are named, if they may write to it and are no administrators. Only
// an administrator learns them.
func TestUsersWithoutLimitsAreNamed(t *testing.T) {
	t.Parallel()
	admin := testenv.AMQP(t)
	broker := testenv.Management(t, admin)
	nameOf := func(login string) string {
		parsed, err := url.Parse(login)
		if err != nil {
			t.Fatal(err)
		}
		return parsed.User.Username()
	}
	free := broker.User(nothing, ".*", nothing)
	limited := broker.User(nothing, ".*", nothing)
	broker.Topics(limited, exchange, nothing, nothing)
	elsewhere := broker.User(nothing, "^(events)$", nothing)
	broker.Topics(elsewhere, "another", nothing, nothing)
	broker.User(nothing, "^(another)$", ".*")
	broker.User("", "", "")
	want := []string{nameOf(free), nameOf(elsewhere)}
	slices.Sort(want)
	if got, err := topology.Unlimited(t.Context(), broker.URL(), admin); err != nil || !slices.Equal(got, want) {
		t.Errorf("got %q, %v, want %q", got, err, want)
	}
	asked, err := url.Parse(broker.URL())
	if err != nil {
		t.Fatal(err)
	}
	asked.User = nil
	if _, err := topology.Unlimited(t.Context(), asked.String(), free); !errors.Is(err, ErrNotAllowed) {
		t.Errorf("a user without tags got %v", err)
	}
}
