package rabbit

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
)

// ErrNotAllowed means that the management API refuses to answer: the user has not the tag that it needs, or another
// password.
var ErrNotAllowed = errors.New("not allowed")

// Unlimited asks RabbitMQ's management API which users may publish every type of message to the topology's exchange,
// because they have no topic permission on it. It leaves out administrators, who may change permissions anyway. The
// user of managementURL, or else that of amqpURL, needs the tag administrator; otherwise the error wraps ErrNotAllowed.
func (t Topology) Unlimited(ctx context.Context, managementURL, amqpURL string) (users []string, err error) {
	api, err := newManagementAPI(managementURL, amqpURL)
	if err != nil {
		return nil, err
	}
	defer api.client.CloseIdleConnections()
	var all []struct {
		Name string `json:"name"`
		Tags any    `json:"tags"` // a list; old versions send text
	}
	var permissions []struct {
		User string `json:"user"`
		Permissions
	}
	var limits []struct {
		User string `json:"user"`
		Topics
	}
	if err := errors.Join(
		api.get(ctx, &all, "users"), api.get(ctx, &permissions, "vhosts", api.vhost, "permissions"),
		api.get(ctx, &limits, "vhosts", api.vhost, "topic-permissions"),
	); err != nil {
		return nil, err
	}
	exempt := map[string]bool{}
	for _, user := range all {
		exempt[user.Name] = strings.Contains(fmt.Sprint(user.Tags), "administrator")
	}
	for _, limit := range limits {
		exempt[limit.User] = exempt[limit.User] || limit.Exchange == t.Exchange
	}
	for _, p := range permissions {
		allowed, err := regexp.MatchString(p.Write, t.Exchange)
		if p.Write != "" && (allowed || err != nil) && !exempt[p.User] { // an expression that only RabbitMQ reads may match
			users = append(users, p.User)
		}
	}
	slices.Sort(users)
	return users, nil
}
