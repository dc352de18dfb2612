package clients_test

import (
	"context"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect/v2"
	"connectrpc.com/connect/v2/connecthttp"
	"example.com/shop/internal/clients"
	"example.com/shop/internal/dev/probe"
	"go.opentelemetry.io/otel/trace"
)

// other is another service, which records the requests of its methods.
type other struct {
	url string

	mu      sync.Mutex
	seen    []http.Header
	answers []func(ctx context.Context) error // of the next calls; later ones succeed
}

func startOther(t *testing.T, answers ...func(context.Context) error) *other {
	t.Helper()
	o := &other{answers: answers}
	server := connect.NewServer()
	for _, spec := range []connect.Spec{probe.Mutate, probe.Plain, probe.Read} {
		probe.Handle(server, spec, o.answer)
	}
	mux := http.NewServeMux()
	connecthttp.Mount(mux, server)
	listening := httptest.NewServer(mux)
	t.Cleanup(listening.Close)
	o.url = listening.URL
	return o
}

func (o *other) answer(ctx context.Context, text string) (string, error) {
	info, _ := connect.CallInfoForServerContext(ctx)
	header := http.Header{}
	for name, values := range info.RequestHeader().All() {
		for _, value := range values {
			header.Add(name, value)
		}
	}
	o.mu.Lock()
	o.seen = append(o.seen, header)
	var answer func(context.Context) error
	if len(o.answers) > 0 {
		answer, o.answers = o.answers[0], o.answers[1:]
	}
	o.mu.Unlock()
	if answer != nil {
		return "", answer(ctx)
	}
	return text, nil
}

func (o *other) requests() []http.Header {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.seen
}

// answers is an answer with an error of a code.
func answers(code connect.Code) func(context.Context) error {
	return func(ctx context.Context) error {
		info, _ := connect.CallInfoForServerContext(ctx)
		info.ResponseHeader().Set("Attempt", "failed")
		return connect.NewError(code, "as the test asks")
	}
}

func client(t *testing.T, url string, config clients.Config) *connect.Client {
	t.Helper()
	config.RetryBase = time.Millisecond
	made, done, err := clients.HTTP(url, config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(done)
	return made
}

// Only methods that may be repeated are sent again, only while the service is unavailable, and only so often.
func TestOnlyRepeatableCallsAreRepeated(t *testing.T) {
	t.Parallel()
	type fails = []connect.Code
	const away, broken = connect.CodeUnavailable, connect.CodeInternal
	for name, test := range map[string]struct {
		spec   connect.Spec
		config clients.Config
		fails  fails // of the first attempts
		sent   int
		code   connect.Code // 0 for success
	}{
		"idempotent":       {probe.Mutate, clients.Config{}, fails{away, away}, 3, 0},
		"no side effects":  {probe.Read, clients.Config{}, fails{away}, 2, 0},
		"not idempotent":   {probe.Plain, clients.Config{}, fails{away}, 1, away},
		"another error":    {probe.Mutate, clients.Config{}, fails{broken}, 1, broken},
		"then an error":    {probe.Mutate, clients.Config{}, fails{away, broken}, 2, broken},
		"too often":        {probe.Mutate, clients.Config{}, fails{away, away, away, away}, 4, away},
		"only one attempt": {probe.Mutate, clients.Config{Attempts: 1}, fails{away}, 1, away},
		"success at once":  {probe.Mutate, clients.Config{}, nil, 1, 0},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var failing []func(context.Context) error
			for _, code := range test.fails {
				failing = append(failing, answers(code))
			}
			service := startOther(t, failing...)
			ctx, info := connect.NewClientContext(t.Context())
			answer, err := probe.Call(ctx, client(t, service.url, test.config), test.spec, "text")
			if code := connect.CodeOf(err); err != nil && code != test.code || err == nil && test.code != 0 {
				t.Errorf("got %q, %v, want code %v", answer, err, test.code)
			}
			if err == nil && (answer != "text" || info.ResponseHeader().Has("Attempt")) {
				t.Errorf("got %q with header %q of a failed attempt", answer, info.ResponseHeader().Get("Attempt"))
			}
			if sent := len(service.requests()); sent != test.sent {
				t.Errorf("sent %d times, want %d", sent, test.sent)
			}
		})
	}
}

// A call to a service that never answers ends by its deadline, that of the caller or the configured one, also while it
// waits for its next attempt.
func TestCallsEndByTheirDeadline(t *testing.T) {
	t.Parallel()
	hangs := func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() }
	for name, spec := range map[string]connect.Spec{"Repeatable": probe.Mutate, "Plain": probe.Plain} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			service := startOther(t, hangs, hangs)
			limited := client(t, service.url, clients.Config{Timeout: 50 * time.Millisecond})
			_, err := probe.Call(t.Context(), limited, spec, "text")
			if code := connect.CodeOf(err); code != connect.CodeDeadlineExceeded {
				t.Errorf("configured: got %v, want deadline_exceeded", err)
			}
			ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
			defer cancel()
			_, err = probe.Call(ctx, client(t, service.url, clients.Config{Timeout: time.Hour}), spec, "text")
			if code := connect.CodeOf(err); code != connect.CodeDeadlineExceeded {
				t.Errorf("the caller's: got %v, want deadline_exceeded", err)
			}
		})
	}
	away := answers(connect.CodeUnavailable)
	service := startOther(t, away, away)
	slow, done, err := clients.HTTP(service.url, clients.Config{Timeout: 50 * time.Millisecond, RetryBase: time.Hour})
	if err != nil {
		t.Fatal(err)
	}
	defer done()
	if _, err := probe.Call(t.Context(), slow, probe.Mutate, "text"); connect.CodeOf(err) != connect.CodeUnavailable {
		t.Errorf("while waiting: got %v, want the error of the last attempt", err)
	}
}

// Each attempt carries the credentials and the trace.
func TestEachAttemptHasCredentialsAndTrace(t *testing.T) {
	t.Parallel()
	service := startOther(t, answers(connect.CodeUnavailable))
	caller := client(t, service.url, clients.Config{
		APIKey: "key", Token: func(context.Context) (string, error) { return "token", nil },
	})
	span := trace.NewSpanContext(trace.SpanContextConfig{
		TraceID: trace.TraceID{1}, SpanID: trace.SpanID{2}, TraceFlags: trace.FlagsSampled,
	})
	ctx := trace.ContextWithSpanContext(t.Context(), span)
	if _, err := probe.Call(ctx, caller, probe.Mutate, "text"); err != nil {
		t.Fatal(err)
	}
	if len(service.requests()) != 2 {
		t.Fatalf("%d requests", len(service.requests()))
	}
	for _, header := range service.requests() {
		if header.Get("X-Api-Key") != "key" || header.Get("Authorization") != "Bearer token" ||
			!strings.Contains(header.Get("Traceparent"), span.TraceID().String()) {
			t.Errorf("got headers %v", header)
		}
	}
}

// The credentials are not sent to the host of a redirect.
func TestRedirectsAreNotFollowed(t *testing.T) {
	t.Parallel()
	service := startOther(t)
	moved := httptest.NewServer(http.RedirectHandler(service.url+probe.Mutate.Procedure, http.StatusTemporaryRedirect))
	t.Cleanup(moved.Close)
	caller := client(t, moved.URL, clients.Config{APIKey: "key"})
	if _, err := probe.Call(t.Context(), caller, probe.Mutate, "text"); err == nil {
		t.Error("the redirect was followed")
	}
	if n := len(service.requests()); n != 0 {
		t.Errorf("%d requests reached the other host", n)
	}
}

func TestURLsOfServices(t *testing.T) {
	t.Parallel()
	for url, valid := range map[string]bool{
		"http://billing:8080": true, "https://billing.example/": true,
		"": false, "billing:8080": false, "amqp://billing": false, "http://": false, "http://user:hunter2@ x": false,
	} {
		_, _, err := clients.HTTP(url, clients.Config{})
		if (err == nil) != valid || err != nil && strings.Contains(err.Error(), "hunter2") {
			t.Errorf("%q: %v, want valid %v", url, err, valid)
		}
	}
}
