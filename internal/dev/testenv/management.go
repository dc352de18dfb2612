//go:build unix

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
	"slices"
	"strings"
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

// deleteVhost deletes a vhost, its queues first. A queue that is deleted ends its
// consumers and, in a quorum queue that dead-letters at least once, the process that
// does so. With the vhost gone beneath it that process crashes instead, and RabbitMQ
// allows only one crash in 5 s: at the second it ends the supervisor of all of them,
// and queues of other tests break. A queue is deleted before the one that it
// dead-letters to, which has a longer name.
func (m *management) deleteVhost(ctx context.Context, vhost string) error {
	var queues []Queue
	if err := m.call(ctx, http.MethodGet, nil, &queues, "queues", vhost); err != nil {
		return err
	}
	slices.SortFunc(queues, func(a, b Queue) int { return strings.Compare(a.Name, b.Name) })
	for _, queue := range queues {
		err := m.call(ctx, http.MethodDelete, nil, nil, "queues", vhost, queue.Name)
		if err != nil && !isGone(err) {
			return err
		}
	}
	return m.call(ctx, http.MethodDelete, nil, nil, "vhosts", vhost)
}

// isGone: the queue went on its own, or is going to: it is the exclusive one of a
// connection, which ends with the vhost.
func isGone(err error) bool {
	var status *statusError
	return errors.As(err, &status) &&
		slices.Contains([]int{http.StatusNotFound, http.StatusBadRequest, http.StatusMethodNotAllowed}, status.code)
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
