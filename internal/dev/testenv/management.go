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

// management calls the HTTP API of RabbitMQ's management plugin.
type management struct {
	base *url.URL // with credentials
	http *http.Client
}

var errNoConnections = errors.New("the broker lists no connections")

// statusError is an unsuccessful answer.
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
	// Use a separate transport. Its idle connections can be closed before the goroutines
	// are counted, without closing connections of the tests.
	return &management{base: base, http: &http.Client{Transport: &http.Transport{}}}, nil
}

// call sends body as JSON and decodes the answer into result. Both may be nil. It
// escapes each element of path, because names contain slashes.
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

// deleteVhost deletes the queues of a vhost and then the vhost. Deleting a queue ends
// its consumers and, if it is a quorum queue that dead-letters at least once, its
// dead-lettering process. If the vhost is deleted first, that process crashes. RabbitMQ
// allows only one such crash in 5 s: the second one ends the supervisor of all of these
// processes and breaks the queues of other tests. Delete a queue before the queue that
// it dead-letters to, which has a longer name.
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

// isGone reports whether the queue is already gone, or is an exclusive queue, which
// ends together with its connection and so with the vhost.
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
