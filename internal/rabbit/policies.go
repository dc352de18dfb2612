package rabbit

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
)

// Danger is a policy setting that makes a queue drop messages or give them up early.
type Danger struct {
	Queue string
	// Policy is the name of the policy, and of the operator policy if there is one.
	Policy string
	// Setting is the policy's key and value, such as message-ttl=60000. Effect describes what it does to the queue.
	Setting, Effect string
	// Loses means that messages can be lost. Otherwise they become dead letters or wait in the outbox.
	Loses bool
}

// String returns the danger as a sentence.
func (d Danger) String() string {
	return fmt.Sprintf("policy %s sets %s on queue %s: %s", d.Policy, d.Setting, d.Queue, d.Effect)
}

// effectOf describes what a policy setting does to a queue or dead queue ("" if it does no harm), and whether messages
// are lost. With drop, the queue drops messages on overflow.
//
// If a policy and a queue argument set the same limit, RabbitMQ applies the lower one. For overflow it applies the
// policy, and for dead-letter settings the argument. So queue arguments do not prevent these effects.
func effectOf(setting string, dead, drop bool) (effect string, loses bool) {
	switch setting {
	case "expires":
		return "the broker deletes the queue and its messages after that time without consumers", true
	case "message-ttl":
		if dead {
			return "messages that wait longer are lost", true
		}
		return "messages that wait longer become dead letters", false
	case "max-length", "max-length-bytes":
		if drop {
			return "messages beyond the limit are lost", true
		}
		return "it refuses messages beyond the limit, and the outbox grows", false
	case "overflow":
		if drop {
			return "messages can be lost on their way to the dead queue", true
		}
	case "delivery-limit":
		if dead {
			return "messages that are delivered more often without an ack are lost", true
		}
		return "messages that are delivered more often without an ack become dead letters", false
	}
	return "", false
}

// Policies asks RabbitMQ's management API for policies that endanger the topology's queues. It uses the user of
// managementURL, or else that of amqpURL, and the vhost of amqpURL. The user needs the tag management. A queue that
// does not exist has no policy.
func (t Topology) Policies(ctx context.Context, managementURL, amqpURL string) (found []Danger, err error) {
	api, err := newManagementAPI(managementURL, amqpURL)
	if err != nil {
		return nil, err
	}
	defer api.client.CloseIdleConnections()
	for _, queue := range t.Queues {
		for _, name := range []string{queue.Name, DeadQueue(queue.Name)} {
			state, err := api.queue(ctx, name)
			if err != nil {
				return nil, err
			}
			found = append(found, state.dangers(name != queue.Name)...)
		}
	}
	return found, nil
}

// queueState is what the management API says about a queue.
type queueState struct {
	Name           string          `json:"name"`
	Policy         string          `json:"policy"`
	OperatorPolicy string          `json:"operator_policy"`
	Effective      json.RawMessage `json:"effective_policy_definition"` // an object; old versions send [] for none
}

func (s queueState) dangers(dead bool) (found []Danger) {
	var settings map[string]any
	decoder := json.NewDecoder(bytes.NewReader(s.Effective))
	decoder.UseNumber()
	if decoder.Decode(&settings) != nil {
		return nil
	}
	policies := slices.DeleteFunc([]string{s.Policy, s.OperatorPolicy}, func(name string) bool { return name == "" })
	overflow, set := settings["overflow"]
	for setting, value := range settings {
		effect, loses := effectOf(setting, dead, set && overflow != "reject-publish")
		if effect == "" || setting == "delivery-limit" && !lowers(value, dead) {
			continue
		}
		found = append(found, Danger{
			Queue: s.Name, Policy: strings.Join(policies, " and "), Setting: fmt.Sprintf("%s=%v", setting, value),
			Effect: effect, Loses: loses,
		})
	}
	slices.SortFunc(found, func(a, b Danger) int { return strings.Compare(a.Setting, b.Setting) })
	return found
}

// lowers reports whether a policy's delivery limit is below that of our queue or dead queue. -1 means no limit.
func lowers(limit any, dead bool) bool {
	number, _ := limit.(json.Number)
	n, err := number.Int64()
	if dead {
		return err == nil && n >= 0 && n < deadDeliveryLimit
	}
	return err == nil && n >= 0 && n < deliveryLimit
}

// managementAPI is a client for the parts of RabbitMQ's HTTP API that are used here.
type managementAPI struct {
	base           *url.URL // without credentials, so that no error shows them
	user, password string
	vhost          string
	client         *http.Client
}

// ValidateManagementURL returns nil if the URL can be that of a management API. Its error does not show the URL.
func ValidateManagementURL(managementURL string) error {
	base, err := url.Parse(managementURL)
	if err != nil || base.Host == "" || base.Scheme != "http" && base.Scheme != "https" {
		return errors.New("the URL of the management API is not an HTTP URL")
	}
	return nil
}

func newManagementAPI(managementURL, amqpURL string) (*managementAPI, error) {
	if err := ValidateManagementURL(managementURL); err != nil {
		return nil, err
	}
	base, err := url.Parse(managementURL)
	if err != nil {
		return nil, err
	}
	broker, err := amqp.ParseURI(amqpURL)
	if err != nil {
		return nil, errors.New("AMQP_URL is not an AMQP URL") // err would show it
	}
	api := &managementAPI{base: base, user: broker.Username, password: broker.Password, vhost: broker.Vhost}
	if base.User != nil {
		api.user = base.User.Username()
		api.password, _ = base.User.Password()
	}
	base.User = nil
	api.client = &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{Proxy: http.ProxyFromEnvironment}}
	return api, nil
}

// requestError removes from err the URL that net/http quotes, because its query may contain a secret.
func requestError(err error) error {
	var failed *url.Error
	if errors.As(err, &failed) {
		err = failed.Err
	}
	return fmt.Errorf("call the management API: %w", err)
}

// queue returns what the API says about a queue, or the zero state if the queue does not exist.
func (m *managementAPI) queue(ctx context.Context, name string) (state queueState, err error) {
	err = m.get(ctx, &state, "queues", m.vhost, name)
	return state, err
}

// get reads from the API path that names form, and leaves into unchanged if there is nothing. It escapes the names, so
// they may contain any character.
func (m *managementAPI) get(ctx context.Context, into any, names ...string) error {
	target := m.base.JoinPath("api")
	for _, name := range names {
		target = target.JoinPath(url.PathEscape(name))
	}
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, target.String(), http.NoBody)
	if err != nil {
		return err
	}
	request.SetBasicAuth(m.user, m.password)
	response, err := m.client.Do(request)
	if err != nil {
		return requestError(err)
	}
	defer response.Body.Close()
	switch response.StatusCode {
	case http.StatusOK:
	case http.StatusNotFound:
		return nil
	case http.StatusUnauthorized, http.StatusForbidden:
		return fmt.Errorf("%w: the management API answers user %s with %s", ErrNotAllowed, m.user, response.Status)
	default:
		return fmt.Errorf("the management API answers user %s with %s", m.user, response.Status)
	}
	if err := json.NewDecoder(io.LimitReader(response.Body, 1<<20)).Decode(into); err != nil {
		return fmt.Errorf("decode the management API's response for %s: %w", strings.Join(names, "/"), err)
	}
	return nil
}
