//go:build unix

package main

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"strings"
	"time"

	"example.com/shop/internal/rabbit"
	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	amqp "github.com/rabbitmq/amqp091-go"
)

// sandbox is the database and the vhost of a run, and the proxy between the processes and the broker.
type sandbox struct {
	name        string // of database and vhost
	postgresURL string
	direct      string // AMQP URL that bypasses the proxy, for the tap
	proxy       *proxy
	users       []string // of the broker, one for each process

	serverURL  string // of the Postgres server, as given
	management *url.URL
}

// newSandbox creates a sandbox. It leaves nothing behind if it fails.
func newSandbox(ctx context.Context, flags cli) (_ *sandbox, err error) {
	b := &sandbox{name: "orders_demo_" + uuid.NewString()[:8], serverURL: flags.PostgresURL}
	broker, err := amqp.ParseURI(flags.AMQPURL)
	if err != nil {
		return nil, errors.New("AMQP_URL is not an AMQP URL")
	}
	if b.management, err = managementURL(flags.ManagementURL, broker); err != nil {
		return nil, err
	}
	if b.proxy, err = newProxy(net.JoinHostPort(broker.Host, fmt.Sprint(broker.Port))); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
			defer cancel()
			_ = b.remove(ctx) // err is the error to report
		}
	}()
	b.direct = (&url.URL{
		Scheme: "amqp", User: url.UserPassword(broker.Username, broker.Password),
		Host: net.JoinHostPort(broker.Host, fmt.Sprint(broker.Port)), Path: b.name,
	}).String()
	if b.postgresURL, err = withDatabase(flags.PostgresURL, b.name); err != nil {
		return nil, err
	}
	if err := b.execute(ctx, "CREATE DATABASE "+pgx.Identifier{b.name}.Sanitize()); err != nil {
		return nil, fmt.Errorf("create database: %w", err)
	}
	if err := b.manage(ctx, http.MethodPut, nil, "vhosts", b.name); err != nil {
		return nil, fmt.Errorf("create vhost: %w; the demo needs RabbitMQ's management plugin, "+
			"and RABBITMQ_MANAGEMENT_URL if it is not on port 15672", err)
	}
	all := map[string]string{"configure": ".*", "write": ".*", "read": ".*"}
	if err := b.manage(ctx, http.MethodPut, all, "permissions", b.name, broker.Username); err != nil {
		return nil, fmt.Errorf("grant permissions on the vhost: %w", err)
	}
	return b, nil
}

// remove drops the database, the vhost and the users. On nil it does nothing.
func (b *sandbox) remove(ctx context.Context) error {
	if b == nil {
		return nil
	}
	b.close()
	dropped := b.execute(ctx, "DROP DATABASE IF EXISTS "+pgx.Identifier{b.name}.Sanitize()+" WITH (FORCE)")
	if dropped != nil {
		dropped = fmt.Errorf("drop database %s: %w", b.name, dropped)
	}
	err := b.manage(ctx, http.MethodDelete, nil, "vhosts", b.name)
	if err != nil {
		err = fmt.Errorf("delete vhost %s: %w", b.name, err)
	}
	errs := []error{dropped, err}
	for _, user := range b.users {
		if err := b.manage(ctx, http.MethodDelete, nil, "users", user); err != nil {
			errs = append(errs, fmt.Errorf("delete user %s: %w", user, err))
		}
	}
	return errors.Join(errs...)
}

// addUser creates a user of the broker with these permissions, and returns the URL with its login.
func (b *sandbox) addUser(ctx context.Context, process string, permissions rabbit.Permissions) (string, error) {
	name, password := b.name+"_"+process, rand.Text()
	err := b.manage(ctx, http.MethodPut, map[string]string{"password": password, "tags": ""}, "users", name)
	if err != nil {
		return "", fmt.Errorf("create user %s: %w", name, err)
	}
	b.users = append(b.users, name)
	if topics := permissions.Topics; topics != nil {
		if err := b.manage(ctx, http.MethodPut, topics, "topic-permissions", b.name, name); err != nil {
			return "", fmt.Errorf("limit the topics of %s: %w", name, err)
		}
	}
	permissions.Topics = nil
	if err := b.manage(ctx, http.MethodPut, permissions, "permissions", b.name, name); err != nil {
		return "", fmt.Errorf("grant permissions to %s: %w", name, err)
	}
	login := url.UserPassword(name, password)
	return (&url.URL{Scheme: "amqp", User: login, Host: b.proxy.addr(), Path: b.name}).String(), nil
}

// withRole returns the database's URL for sessions with the rights of a role and no others.
func (b *sandbox) withRole(role string) string {
	if !strings.Contains(b.postgresURL, "://") {
		return b.postgresURL + " role=" + role
	}
	separator := "?"
	if strings.Contains(b.postgresURL, "?") {
		separator = "&"
	}
	return b.postgresURL + separator + "role=" + role
}

// close stops the proxy. On nil it does nothing.
func (b *sandbox) close() {
	if b != nil {
		b.proxy.close()
	}
}

// execute runs a statement in the database of the given URL, not in that of the sandbox.
func (b *sandbox) execute(ctx context.Context, sql string) error {
	conn, err := pgx.Connect(ctx, b.serverURL)
	if err != nil {
		return err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	_, err = conn.Exec(ctx, sql)
	return err
}

// manage calls RabbitMQ's management API.
func (b *sandbox) manage(ctx context.Context, method string, body any, path ...string) error {
	content, err := json.Marshal(body)
	if err != nil {
		return err
	}
	target := b.management.JoinPath("api")
	for _, element := range path {
		target = target.JoinPath(url.PathEscape(element))
	}
	request, err := http.NewRequestWithContext(ctx, method, target.String(), strings.NewReader(string(content)))
	if err != nil {
		return err
	}
	request.Header.Set("Content-Type", "application/json")
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	if response.StatusCode/100 != 2 {
		return fmt.Errorf("%s %s: %s", method, target.Path, response.Status)
	}
	return nil
}

// managementURL returns the given URL of the management API, or guesses it.
func managementURL(given string, broker amqp.URI) (*url.URL, error) {
	login := url.UserPassword(broker.Username, broker.Password)
	if given == "" {
		return &url.URL{Scheme: "http", User: login, Host: net.JoinHostPort(broker.Host, "15672")}, nil
	}
	parsed, err := url.Parse(given)
	if err != nil || parsed.Host == "" {
		return nil, errors.New("RABBITMQ_MANAGEMENT_URL is not a URL")
	}
	if parsed.User == nil {
		parsed.User = login
	}
	return parsed, nil
}

// withDatabase replaces the database in a URL or a libpq connection string, in which the last keyword wins.
func withDatabase(given, name string) (string, error) {
	if !strings.HasPrefix(given, "postgres://") && !strings.HasPrefix(given, "postgresql://") {
		return given + " dbname=" + name, nil
	}
	parsed, err := url.Parse(given)
	if err != nil {
		return "", errors.New("POSTGRES_URL is not a URL")
	}
	parsed.Path = "/" + name
	query := parsed.Query()
	query.Del("dbname")
	query.Del("database")
	parsed.RawQuery = query.Encode()
	return parsed.String(), nil
}
