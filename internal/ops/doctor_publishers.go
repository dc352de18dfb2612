package ops

import (
	"context"
	"errors"

	"example.com/shop/internal/rabbit"
)

// checkPublishers finds users of the broker that could publish other services' events. Only administrators can ask for
// permissions, and only checkPolicies reports an API that does not answer.
func checkPublishers(ctx context.Context, target Target) (Finding, error) {
	if target.ManagementURL == "" {
		return Finding{Detail: "not checked, because RABBITMQ_MANAGEMENT_URL is not set"}, nil
	}
	users, err := target.Topology.Unlimited(ctx, target.ManagementURL, target.AMQPURL)
	switch {
	case errors.Is(err, rabbit.ErrNotAllowed):
		return Finding{Detail: "not checked, because the user of RABBITMQ_MANAGEMENT_URL is no administrator"}, nil
	case err != nil:
		return Finding{Detail: "not checked: " + err.Error()}, nil
	}
	for i, user := range users {
		users[i] = "user " + user + " may publish every type to exchange " + target.Topology.Exchange
	}
	return listFinding(users, nil, Attention, "each user may publish its own types only")
}
