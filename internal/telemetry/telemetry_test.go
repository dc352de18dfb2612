package telemetry

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
	"go.opentelemetry.io/otel"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// collect runs an OTLP collector over HTTP. got receives its requests.
func collect(t *testing.T) (url string, got <-chan string) {
	t.Helper()
	requests := make(chan string, 10)
	server := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		requests <- fmt.Sprintf("%s %s %s %s", r.Method, r.URL.Path, r.Header.Get("Authorization"), body)
	}))
	t.Cleanup(server.Close)
	return server.URL, requests
}

// Tests that set environment variables cannot run in parallel.

func TestSpansGoToTheConfiguredCollector(t *testing.T) {
	url, got := collect(t)
	t.Setenv("OTEL_EXPORTER_OTLP_ENDPOINT", url)
	t.Setenv("OTEL_EXPORTER_OTLP_HEADERS", "Authorization=Bearer%20token")
	t.Setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=lab,service.version=9")
	p, err := Start(t.Context(), Config{Service: "shop", Process: "relay", Version: "1"})
	if err != nil {
		t.Fatal(err)
	}
	_, span := p.Tracer.Tracer("test").Start(t.Context(), "a span")
	span.End()
	done, cancel := context.WithCancel(t.Context())
	cancel()
	if err := p.Stop(done); err != nil { // exports the remaining spans although ctx is done
		t.Fatal(err)
	}
	request := <-got
	for _, part := range []string{
		"POST /v1/traces Bearer token", "a span", "shop-relay", "deployment.environment.name", "\x019",
	} {
		if !strings.Contains(request, part) {
			t.Errorf("%q is not in the request: %q", part, request)
		}
	}
}

func TestWithoutCollectorThereIsNoTracer(t *testing.T) {
	for name, environment := range map[string]map[string]string{
		"NotNamed":     {},
		"Disabled":     {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_SDK_DISABLED": "true"},
		"ExporterNone": {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://127.0.0.1:1", "OTEL_TRACES_EXPORTER": "none"},
	} {
		t.Run(name, func(t *testing.T) {
			for key, value := range environment {
				t.Setenv(key, value)
			}
			p, err := Start(t.Context(), Config{Service: "shop", Process: "api"})
			if err != nil {
				t.Fatal(err)
			}
			if p.Tracer != nil {
				t.Error("got a tracer")
			}
			if err := p.Stop(t.Context()); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestAnInvalidEndpointIsNamedWithoutItsValue(t *testing.T) {
	for _, wrong := range []string{"hunter2:4318", "http://u:hunter2@%zz", "grpc://u:hunter2@collector"} {
		t.Setenv("OTEL_EXPORTER_OTLP_ENDPOINT", wrong)
		_, err := Start(t.Context(), Config{})
		text := fmt.Sprint(err)
		if err == nil || !strings.Contains(text, "OTEL_EXPORTER_OTLP_ENDPOINT") || strings.Contains(text, "hunter2") {
			t.Errorf("%s: got error %v", wrong, err)
		}
	}
}

// OpenTelemetry's errors are logged without the values of its variables, which may contain tokens.
func TestErrorsOfTheLibraryAreLoggedWithoutSecrets(t *testing.T) {
	var out bytes.Buffer
	HandleErrors(NewLogger(&out, "text", slog.LevelDebug))
	t.Cleanup(func() { HandleErrors(slog.Default()) })
	t.Setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://u:hunter2@127.0.0.1:1")
	t.Setenv("OTEL_EXPORTER_OTLP_HEADERS", "hunter2")
	p, err := Start(t.Context(), Config{Service: "shop", Process: "api"})
	if err != nil {
		t.Fatal(err)
	}
	_, span := p.Tracer.Tracer("test").Start(t.Context(), "a span")
	span.End()
	began := time.Now()
	otel.Handle(p.Stop(t.Context()))
	if took := time.Since(began); took > stopTimeout+2*time.Second {
		t.Errorf("Stop took %s", took)
	}
	text := out.String()
	if strings.Contains(text, "hunter2") || !strings.Contains(text, "parse headers") ||
		!strings.Contains(text, "127.0.0.1:1") {
		t.Errorf("logged: %s", text)
	}
}

func TestLogLinesContainTheirTrace(t *testing.T) {
	t.Parallel()
	for _, format := range []string{"text", "json"} {
		var out bytes.Buffer
		log := NewLogger(&out, format, slog.LevelInfo).With("a", 1)
		ctx, span := sdktrace.NewTracerProvider().Tracer("test").Start(t.Context(), "a span")
		log.InfoContext(ctx, "within")
		for _, id := range []string{span.SpanContext().TraceID().String(), span.SpanContext().SpanID().String()} {
			if !strings.Contains(out.String(), id) {
				t.Errorf("%s: %s is not in %s", format, id, out.String())
			}
		}
		out.Reset()
		log.InfoContext(t.Context(), "outside")
		log.DebugContext(ctx, "below the level")
		if strings.Contains(out.String(), "trace_id") || strings.Contains(out.String(), "below the level") {
			t.Errorf("%s: logged %s", format, out.String())
		}
	}
}

func TestErrorsAreLoggedWithoutTheValuesThatTheyQuote(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		err  error
		want string
	}{
		"Postgres": {
			&pgconn.PgError{
				Severity: "ERROR", Code: "22P02", Message: `invalid input syntax for type uuid: "value"`,
			},
			"place: ERROR: (values not shown) (SQLSTATE 22P02)",
		},
		"Raised": {
			&pgconn.PgError{Severity: "ERROR", Code: "P0001", Message: "no value"},
			"place: ERROR: (values not shown) (SQLSTATE P0001)",
		},
		"Encoding": {
			errors.New("failed to encode args[2]: unable to encode \"value\n\" into binary"),
			"place: failed to encode args[2]",
		},
		"NotAboutValue": {
			&pgconn.PgError{Severity: "ERROR", Code: "42P01", Message: "relation does not exist"},
			"place: ERROR: relation does not exist (SQLSTATE 42P01)",
		},
	} {
		var out bytes.Buffer
		NewLogger(&out, "text", slog.LevelInfo).Info("failed", "error", fmt.Errorf("place: %w", test.err))
		if want := fmt.Sprintf("error=%q\n", test.want); !strings.HasSuffix(out.String(), want) {
			t.Errorf("%s: logged %s, want %s", name, out.String(), want)
		}
	}
}
