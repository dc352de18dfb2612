package rabbit

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
)

// User is a broker user with its permissions in one vhost.
type User struct {
	Name, Password string
	Permissions    Permissions
}

// MakeUsers creates users through RabbitMQ's management API and sets their permissions in the vhost of amqpURL. It
// authenticates as the user of managementURL, or else of amqpURL, who needs the tag administrator. If a user exists,
// MakeUsers resets its password and permissions and removes its tags. Its permissions in other vhosts stay, and so do
// its topic permissions on other exchanges.
func MakeUsers(ctx context.Context, managementURL, amqpURL string, users ...User) error {
	api, err := newManagementAPI(managementURL, amqpURL)
	if err != nil {
		return err
	}
	defer api.client.CloseIdleConnections()
	for _, user := range users {
		if user.Name == api.user {
			return fmt.Errorf("user %s would revoke its own rights: use another administrator", user.Name)
		}
		login := map[string]string{"password": user.Password, "tags": ""}
		if err := api.put(ctx, login, "users", user.Name); err != nil {
			return fmt.Errorf("create user %s: %w", user.Name, err)
		}
		if err := api.permit(ctx, user.Name, user.Permissions); err != nil {
			return fmt.Errorf("set the permissions of user %s: %w", user.Name, err)
		}
	}
	return nil
}

// permit sets the permissions of a user. It sets those on topics first: without them, a user may publish everything to
// an exchange that it may write to.
func (m *managementAPI) permit(ctx context.Context, user string, p Permissions) error {
	if p.Topics != nil {
		if err := m.put(ctx, p.Topics, "topic-permissions", m.vhost, user); err != nil {
			return err
		}
	}
	p.Topics = nil
	return m.put(ctx, p, "permissions", m.vhost, user)
}

// put writes content to the API path that names form. It escapes them, so they may contain any character.
func (m *managementAPI) put(ctx context.Context, content any, names ...string) error {
	body, err := json.Marshal(content)
	if err != nil {
		return err
	}
	target := m.base.JoinPath("api")
	for _, name := range names {
		target = target.JoinPath(url.PathEscape(name))
	}
	request, err := http.NewRequestWithContext(ctx, http.MethodPut, target.String(), bytes.NewReader(body))
	if err != nil {
		return err
	}
	request.SetBasicAuth(m.user, m.password)
	request.Header.Set("Content-Type", "application/json")
	response, err := m.client.Do(request)
	if err != nil {
		return requestError(err)
	}
	if err := response.Body.Close(); err != nil {
		return err
	}
	if response.StatusCode/100 != 2 {
		return fmt.Errorf("the management API answers user %s with %s", m.user, response.Status)
	}
	return nil
}

// WithPassword adds the password, which may be any text, to a URL that has a user and no password. Other URLs it
// returns unchanged. The URL must be one that ValidateURL or ValidateManagementURL accepts.
func WithPassword(rawURL, password string) (string, error) {
	parsed, err := url.Parse(rawURL)
	if err != nil {
		return "", errors.New("not a URL") // err would show it
	}
	if parsed.User == nil || password == "" {
		return rawURL, nil
	}
	if _, has := parsed.User.Password(); has {
		return rawURL, nil
	}
	parsed.User = url.UserPassword(parsed.User.Username(), password)
	return parsed.String(), nil
}
