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

// fromEnvironment returns the servers named by the environment, or nil if it names
// none. Half a configuration is an error: starting the other half silently would
// run tests against a mixture that nobody asked for.
func fromEnvironment(getenv func(string) string) (*Stack, error) {
	stack := Stack{
		PostgresURL:   getenv(postgresVar),
		AMQPURL:       getenv(amqpVar),
		ManagementURL: getenv(managementVar),
		External:      true,
	}
	switch {
	case stack.PostgresURL == "" && stack.AMQPURL == "":
		return nil, nil
	case stack.AMQPURL == "":
		return nil, errors.New("POSTGRES_URL is set but AMQP_URL is not: set both to use running servers, neither to start private ones")
	case stack.PostgresURL == "":
		return nil, errors.New("AMQP_URL is set but POSTGRES_URL is not: set both to use running servers, neither to start private ones")
	}
	if stack.ManagementURL == "" {
		var err error
		if stack.ManagementURL, err = managementURL(stack.AMQPURL); err != nil {
			return nil, err
		}
	}
	return &stack, nil
}

// managementURL guesses the management API of a broker: same host and user, the
// ports that the plugin has by default.
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
