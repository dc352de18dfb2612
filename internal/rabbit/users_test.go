package rabbit

import (
	"errors"
	"net/url"
	"testing"

	"example.com/shop/internal/dev/testenv"
	amqp "github.com/rabbitmq/amqp091-go"
)

// A password may be any text, in a URL and outside it.
func TestMadeUsersMayDoWhatTheyShouldAndNoMore(t *testing.T) {
	t.Parallel()
	admin := testenv.AMQP(t)
	given := topology
	if err := given.Declare(t.Context(), admin); err != nil {
		t.Fatal(err)
	}
	given.Given = true
	broker := testenv.Management(t, admin)
	for _, password := range []string{"p@ss", "ab/cd+e=", "50%&?#:[ü] \"'"} {
		made, err := url.Parse(broker.User("", "", "")) // the user is deleted when the test ends
		if err != nil {
			t.Fatal(err)
		}
		name := made.User.Username()
		relay := User{Name: name, Password: password, Permissions: given.PublisherPermissions()}
		if err := MakeUsers(t.Context(), broker.URL(), admin, relay); err != nil {
			t.Fatal(err)
		}
		bare, err := url.Parse(admin)
		if err != nil {
			t.Fatal(err)
		}
		bare.User = url.User(name)
		whole, err := WithPassword(bare.String(), password)
		if err != nil {
			t.Fatal(err)
		}
		mustPublish(t, newPublisher(t, PublisherConfig{URL: whole, Topology: given}), text("k", "a"))
		conn, err := amqp.Dial(whole)
		if err != nil {
			t.Fatal(err)
		}
		channel, err := conn.Channel()
		if err == nil {
			_, _, err = channel.Get(queue, true)
		}
		var refused *amqp.Error
		if !errors.As(err, &refused) || refused.Code != amqp.AccessRefused {
			t.Errorf("a relay reads a message: got %v, want access refused", err)
		}
		if err := conn.Close(); err != nil {
			t.Error(err)
		}
	}
}

func TestAdministratorKeepsItsRights(t *testing.T) {
	t.Parallel()
	admin := testenv.AMQP(t)
	api, err := newManagementAPI(testenv.Management(t, admin).URL(), admin)
	if err != nil {
		t.Fatal(err)
	}
	if err := MakeUsers(t.Context(), testenv.Management(t, admin).URL(), admin, User{Name: api.user}); err == nil {
		t.Error("the administrator revoked its own rights")
	}
}

func TestWithPasswordKeepsAnExistingPassword(t *testing.T) {
	for given, want := range map[string]string{
		"amqp://u@h/v": "amqp://u:p%40%2F@h/v", "amqp://u:x@h/v": "amqp://u:x@h/v", "amqp://h/v": "amqp://h/v",
		"http://u@h:15672": "http://u:p%40%2F@h:15672", "amqp://u@h/%2f": "amqp://u:p%40%2F@h/%2f",
	} {
		if got, err := WithPassword(given, "p@/"); err != nil || got != want {
			t.Errorf("%s: got %s, %v", given, got, err)
		}
	}
	if got, err := WithPassword("amqp://u@h/v", ""); err != nil || got != "amqp://u@h/v" {
		t.Errorf("without a password: got %s, %v", got, err)
	}
}
