package rpcserver_test

import (
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect/v2"
	"example.com/shop/internal/auth"
	"example.com/shop/internal/dev/testenv"
	"example.com/shop/internal/rpcserver"
)

// budgeted starts a server with a budget for a number of callers, and returns a key for each.
func budgeted(
	t *testing.T, budget *rpcserver.Budget, callers int, method func(context.Context, string) (string, error),
) (*running, []string) {
	t.Helper()
	secrets, lines := make([]string, callers), ""
	for i := range secrets {
		secret, line, err := auth.NewKey(fmt.Sprint("caller", i), []string{"customer"})
		if err != nil {
			t.Fatal(err)
		}
		secrets[i], lines = secret, lines+line+"\n"
	}
	keys, err := auth.ParseKeys(lines)
	if err != nil {
		t.Fatal(err)
	}
	return serve(t, rpcserver.Config{Budget: budget, Interceptors: []connect.ServerInterceptor{
		auth.Identify(auth.Config{Keys: keys}), rpcserver.Limit(rpcserver.LimitConfig{Budget: budget}),
	}}, unary(method)), secrets
}

// hold sends a message except for its end, over its own connection, until release is called. answered receives a
// response that comes earlier.
func hold(t *testing.T, server *running, secret string, size int) (answered <-chan *http.Response, release func()) {
	t.Helper()
	body, held := io.Pipe()
	request, err := http.NewRequestWithContext(t.Context(), http.MethodPost, server.url+unarySpec.Procedure, body)
	if err != nil {
		t.Fatal(err)
	}
	request.ContentLength = int64(size)
	request.Header.Set("Content-Type", "application/json")
	request.Header.Set("X-Api-Key", secret)
	client, got := httpClient(t, true), make(chan *http.Response, 1)
	go func() {
		if response, err := client.Do(request); err == nil {
			response.Body.Close()
			got <- response
		}
	}()
	go func() { _, _ = io.Copy(held, strings.NewReader(`"`+strings.Repeat("x", size-2))) }()
	return got, func() { _ = held.CloseWithError(errors.New("released")) }
}

const mebibyte = 1 << 20

// The total size of arriving messages is bounded even if no caller exceeds its limits. Callers that withhold the end of
// their messages cannot fill the memory, and one caller cannot take the memory that others need.
func TestHeldBodiesAreBounded(t *testing.T) {
	t.Parallel()
	const size = 64 * mebibyte
	budget := rpcserver.NewBudget(size, 4*mebibyte)
	server, secrets := budgeted(t, budget, 25, echo)
	var releases []func()
	refused := make(chan *http.Response, 24)
	for _, secret := range secrets[:24] {
		answered, release := hold(t, server, secret, 4*mebibyte)
		releases = append(releases, release)
		go func() {
			select {
			case response := <-answered:
				refused <- response
			case <-t.Context().Done():
			}
		}()
	}
	for range 24 - size/(4*4*mebibyte) { // all except those that fit
		select {
		case response := <-refused:
			if response.StatusCode != http.StatusTooManyRequests || response.Header.Get("Retry-After") == "" {
				t.Errorf("refused with %s, %v", response.Status, response.Header)
			}
		case <-time.After(30 * time.Second):
			t.Fatal("too few messages are refused")
		}
	}
	if used := budget.Used(); used > size {
		t.Errorf("%d bytes are used, want at most %d", used, size)
	}
	for _, release := range releases {
		release()
	}
	testenv.Eventually(t, 20*time.Second, func() error {
		if used := budget.Used(); used != 0 {
			return fmt.Errorf("%d bytes are used without a call", used)
		}
		return nil
	})
	largest := strings.NewReader(`"` + strings.Repeat("x", 4*mebibyte-2) + `"`)
	response := post(t, server, http.Header{"X-Api-Key": {secrets[24]}}, largest)
	if response.StatusCode != http.StatusOK {
		t.Errorf("the largest message afterwards: %s", response.Status)
	}
}

func TestOneCallerHasAShareOfTheBudget(t *testing.T) {
	t.Parallel()
	// A share is 16 MiB. After three messages of 1 MiB it has no room for a fourth.
	budget := rpcserver.NewBudget(64*mebibyte, mebibyte)
	server, secrets := budgeted(t, budget, 2, echo)
	// Only a full share refuses, so the bytes that a refused call still holds after its answer cannot be mistaken for an
	// accepted one's.
	accepted := int64(0)
	for range 12 {
		answered, release := hold(t, server, secrets[0], mebibyte)
		defer release()
		testenv.Eventually(t, time.Minute, func() error {
			select {
			case <-answered:
				return nil
			default:
			}
			if budget.Used() < (accepted+1)*4*(mebibyte-1) {
				return errors.New("the body has not arrived")
			}
			accepted++
			return nil
		})
	}
	if used := budget.Used(); used > 16*mebibyte {
		t.Errorf("one caller uses %d bytes", used)
	}
	for name, secret := range map[string]string{"the same caller": secrets[0], "another caller": secrets[1]} {
		body := strings.NewReader(`"` + strings.Repeat("x", mebibyte-2) + `"`)
		response := post(t, server, http.Header{"X-Api-Key": {secret}}, body)
		if served := response.StatusCode == http.StatusOK; served != (secret == secrets[1]) {
			t.Errorf("%s: %s", name, response.Status)
		}
	}
}

// A call pays for an inflated message as for one that arrives uncompressed, until the call ends.
func TestInflatedMessagesArePaidFor(t *testing.T) {
	t.Parallel()
	budget := rpcserver.NewBudget(64*mebibyte, 4*mebibyte)
	held := make(chan int64, 1)
	server, secrets := budgeted(t, budget, 1, func(context.Context, string) (string, error) {
		held <- budget.Used()
		return "", nil
	})
	var packed bytes.Buffer
	zip := gzip.NewWriter(&packed)
	_, _ = io.WriteString(zip, `"`+strings.Repeat("x", 3*mebibyte)+`"`)
	if err := zip.Close(); err != nil {
		t.Fatal(err)
	}
	response := post(t, server, http.Header{"X-Api-Key": {secrets[0]}, "Content-Encoding": {"gzip"}}, &packed)
	if response.StatusCode != http.StatusOK {
		t.Fatal(response.Status)
	}
	if got := <-held; got < 6*mebibyte || got > 7*mebibyte {
		t.Errorf("%d bytes are used during the call, want twice the message", got)
	}
	testenv.Eventually(t, 20*time.Second, func() error {
		if used := budget.Used(); used != 0 {
			return fmt.Errorf("%d bytes are used after the call", used)
		}
		return nil
	})
}
