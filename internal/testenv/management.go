package testenv

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
)

// management speaks to the HTTP API of RabbitMQ's management plugin.
type management struct {
	base *url.URL // with credentials
	http *http.Client
}

var errNoConnections = errors.New("the broker lists no connections")

// statusError is an answer that is not a success.
type statusError struct {
	code int
	text string
}

func (e *statusError) Error() string { return e.text }

func isNotFound(err error) bool {
	var status *statusError
	return errors.As(err, &status) && status.code == http.StatusNotFound
}

func newManagement(rawURL string) (*management, error) {
	base, err := url.Parse(rawURL)
	if err != nil {
		return nil, fmt.Errorf("parse management url: %w", err)
	}
	// A transport of its own, so that its idle connections can be closed before
	// goroutines are counted without closing anyone else's.
	return &management{base: base, http: &http.Client{Transport: &http.Transport{}}}, nil
}

// call sends body as JSON unless it is nil and decodes the answer into result
// unless that is nil. Each element of path is escaped, since names contain slashes.
func (m *management) call(ctx context.Context, method string, body, result any, path ...string) error {
	var content bytes.Buffer
	if body != nil {
		if err := json.NewEncoder(&content).Encode(body); err != nil {
			return fmt.Errorf("encode request: %w", err)
		}
	}
	request, err := http.NewRequestWithContext(ctx, method, m.url(path), &content)
	if err != nil {
		return err
	}
	request.Header.Set("Content-Type", "application/json")
	response, err := m.http.Do(request)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	answer, err := io.ReadAll(response.Body)
	if err != nil {
		return fmt.Errorf("read answer: %w", err)
	}
	if response.StatusCode/100 != 2 {
		return &statusError{response.StatusCode, fmt.Sprintf("%s %v: %s: %s", method, path, response.Status, answer)}
	}
	if result == nil {
		return nil
	}
	if err := json.Unmarshal(answer, result); err != nil {
		return fmt.Errorf("decode answer: %w", err)
	}
	return nil
}

func (m *management) url(path []string) string {
	target := *m.base
	target.Path, target.RawPath = "/api", "/api"
	for _, element := range path {
		target.Path += "/" + element
		target.RawPath += "/" + url.PathEscape(element)
	}
	return target.String()
}
