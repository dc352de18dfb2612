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

// User is a user of the broker and what it may do in one vhost.
type User struct {
	Name, Password string
	Permissions    Permissions
}

// MakeUsers makes users through RabbitMQ's management API and gives them their permissions in the vhost of amqpURL. It
// asks as the user of managementURL, or else of amqpURL, who needs the tag administrator. A user that is there gets the
// password and the permissions anew, and loses its tags. What it may do in other vhosts stays.
func MakeUsers(ctx context.Context, managementURL, amqpURL string, users ...User) error {
	api, err := newManagementAPI(managementURL, amqpURL)
	if err != nil {
		return err
	}
	defer api.client.CloseIdleConnections()
	for _, user := range users {
		if user.Name == api.user {
			return fmt.Errorf("user %s cannot take its own rights away: use another administrator", user.Name)
		}
		login := map[string]string{"password": user.Password, "tags": ""}
		if err := api.put(ctx, login, "users", user.Name); err != nil {
			return fmt.Errorf("make user %s: %w", user.Name, err)
		}
		if err := api.put(ctx, user.Permissions, "permissions", api.vhost, user.Name); err != nil {
			return fmt.Errorf("give user %s its permissions: %w", user.Name, err)
		}
	}
	return nil
}

// put writes what is found under names, which may contain anything.
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
		return askFailed(err)
	}
	if err := response.Body.Close(); err != nil {
		return err
	}
	if response.StatusCode/100 != 2 {
		return fmt.Errorf("the management API answers %s to user %s", response.Status, m.user)
	}
	return nil
}

// WithPassword returns a URL with this password, any text, if it names a user and no password. The URL is one that
// ValidateURL or ValidateManagementURL accepts.
func WithPassword(rawURL, password string) (string, error) {
	parsed, err := url.Parse(rawURL)
	if err != nil {
		return "", errors.New("not a URL") // the error would show it
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
