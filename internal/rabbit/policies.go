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

// Danger is a setting of a policy that makes a queue drop messages, or give them up early.
type Danger struct {
	Queue string
	// Policy is the name of the policy, and of the operator policy if there is one.
	Policy string
	// Setting is the policy's key and value, such as message-ttl=60000, and Effect says in words what it does to the
	// queue.
	Setting, Effect string
	// Loses tells whether messages can be lost. Otherwise they become dead letters, or wait in the outbox.
	Loses bool
}

// String says it in a sentence.
func (d Danger) String() string {
	return fmt.Sprintf("policy %s sets %s on queue %s: %s", d.Policy, d.Setting, d.Queue, d.Effect)
}

// effectOf says what a policy's setting does to a queue or dead queue, "" if it does no harm, and whether messages are
// lost. With drop, what overflows is dropped.
//
// Of a limit that both a policy and an argument of the queue set, RabbitMQ takes the lower one; of overflow, the
// policy's; of what is about dead letters, the argument. So arguments keep no policy from doing this.
func effectOf(setting string, dead, drop bool) (effect string, loses bool) {
	switch setting {
	case "expires":
		return "the broker deletes it, with its messages, when nobody has consumed from it for that time", true
	case "message-ttl":
		if dead {
			return "what waits longer is lost", true
		}
		return "what waits longer becomes a dead letter", false
	case "max-length", "max-length-bytes":
		if drop {
			return "what is more is lost", true
		}
		return "it refuses what is more, and the outbox grows", false
	case "overflow":
		if drop {
			return "what it gives up can be lost on the way to the dead queue", true
		}
	case "delivery-limit":
		if dead {
			return "what is delivered more often without an ack is lost", true
		}
		return "what is delivered more often without an ack becomes a dead letter", false
	}
	return "", false
}

// Policies asks RabbitMQ's management API which policies are dangerous to the topology's queues. The managementURL may
// have a user; otherwise that of amqpURL, whose vhost it is about, is taken. The user needs the tag management. A queue
// that is not there has no policy.
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
	Effective      json.RawMessage `json:"effective_policy_definition"` // an object, or in old versions [] for none
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

// lowers tells whether a delivery limit of a policy is below that of our queue or dead queue. None is -1.
func lowers(limit any, dead bool) bool {
	number, _ := limit.(json.Number)
	n, err := number.Int64()
	if dead {
		return err == nil && n >= 0 && n < deadDeliveryLimit
	}
	return err == nil && n >= 0 && n < deliveryLimit
}

// managementAPI is RabbitMQ's HTTP API, as far as it is needed here.
type managementAPI struct {
	base           *url.URL // without credentials, so that no error shows them
	user, password string
	vhost          string
	client         *http.Client
}

// ValidateManagementURL tells whether a URL can be that of a management API. Its error does not show the URL.
func ValidateManagementURL(managementURL string) error {
	base, err := url.Parse(managementURL)
	if err != nil || base.Host == "" || base.Scheme != "http" && base.Scheme != "https" {
		return errors.New("the URL of the management API is not a URL of HTTP")
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
		return nil, errors.New("AMQP_URL is not a URL of RabbitMQ") // the error would show it
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

// askFailed is the error of a request without the URL that net/http quotes: a query may hold a secret.
func askFailed(err error) error {
	var failed *url.Error
	if errors.As(err, &failed) {
		err = failed.Err
	}
	return fmt.Errorf("ask the management API: %w", err)
}

// queue returns what the API says about a queue, or nothing if there is none.
func (m *managementAPI) queue(ctx context.Context, name string) (state queueState, err error) {
	target := m.base.JoinPath("api", "queues", url.PathEscape(m.vhost), url.PathEscape(name))
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, target.String(), http.NoBody)
	if err != nil {
		return state, err
	}
	request.SetBasicAuth(m.user, m.password)
	response, err := m.client.Do(request)
	if err != nil {
		return state, askFailed(err)
	}
	defer response.Body.Close()
	switch response.StatusCode {
	case http.StatusOK:
	case http.StatusNotFound:
		return state, nil
	default:
		return state, fmt.Errorf("the management API answers %s to user %s", response.Status, m.user)
	}
	if err := json.NewDecoder(io.LimitReader(response.Body, 1<<20)).Decode(&state); err != nil {
		return state, fmt.Errorf("the management API's answer about queue %s: %w", name, err)
	}
	return state, nil
}
