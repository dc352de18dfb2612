//go:build unix

package localstack

import (
	"errors"
	"fmt"
	"net"
	"net/url"
)

const (
	dirVar        = "STACK_DIR"
	postgresVar   = "POSTGRES_URL"
	amqpVar       = "AMQP_URL"
	managementVar = "RABBITMQ_MANAGEMENT_URL"
)

// fromEnvironment returns the servers that the environment names, or nil if it names
// none. It is an error if only one is named: starting the other one silently would
// run tests against an unintended mixture.
func fromEnvironment(getenv func(string) string) (*Stack, error) {
	stack := Stack{
		PostgresURL:   getenv(postgresVar),
		AMQPURL:       getenv(amqpVar),
		ManagementURL: getenv(managementVar),
		External:      true,
	}
	const remedy = "set both to use running servers, neither to start private ones"
	switch {
	case stack.PostgresURL == "" && stack.AMQPURL == "":
		return nil, nil
	case stack.AMQPURL == "":
		return nil, errors.New("POSTGRES_URL is set but AMQP_URL is not: " + remedy)
	case stack.PostgresURL == "":
		return nil, errors.New("AMQP_URL is set but POSTGRES_URL is not: " + remedy)
	}
	if stack.ManagementURL == "" {
		var err error
		if stack.ManagementURL, err = managementURL(stack.AMQPURL); err != nil {
			return nil, err
		}
	}
	return &stack, nil
}

// managementURL guesses the URL of a broker's management API: the same host and user,
// and the plugin's default port.
func managementURL(amqpURL string) (string, error) {
	parsed, err := url.Parse(amqpURL)
	if err != nil {
		return "", fmt.Errorf("parse AMQP_URL: %w", err)
	}
	scheme, port := "http", "15672"
	if parsed.Scheme == "amqps" {
		scheme, port = "https", "15671"
	}
	user := parsed.User
	if user == nil {
		user = url.UserPassword(rabbitmqUser, rabbitmqUser)
	}
	management := url.URL{Scheme: scheme, User: user, Host: net.JoinHostPort(parsed.Hostname(), port)}
	return management.String(), nil
}
