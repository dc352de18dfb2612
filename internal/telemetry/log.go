package telemetry

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net/url"
	"regexp"
	"strings"

	"example.com/shop/internal/bounds"
	"github.com/jackc/pgx/v5/pgconn"
	"go.opentelemetry.io/otel/trace"
)

// NewLogger returns a logger that writes lines to w, as JSON if format is "json", otherwise as text. Lines that are
// logged within a trace contain trace_id and span_id. URLs lose their user info, query and fragment.
func NewLogger(w io.Writer, format string, level slog.Level) *slog.Logger {
	options := &slog.HandlerOptions{Level: level, ReplaceAttr: withoutSecrets}
	if format == "json" {
		return slog.New(traced{slog.NewJSONHandler(w, options)})
	}
	return slog.New(traced{slog.NewTextHandler(w, options)})
}

// encodeError matches pgx's error for an argument that it cannot encode. The error quotes the argument.
var encodeError = regexp.MustCompile(`(?s)(failed to encode args\[\d+\]):.*`)

// withoutSecrets removes the secrets of URLs. It sees every attribute last, so it covers all callers of the logger.
func withoutSecrets(groups []string, attr slog.Attr) slog.Attr {
	attr = withoutValues(groups, attr)
	switch value := attr.Value.Any().(type) {
	case string:
		attr.Value = slog.StringValue(bounds.URLs(value))
	case *url.URL:
		attr.Value = slog.StringValue(bounds.URLs(value.String()))
	}
	return attr
}

// withoutValues removes values from errors. Postgres quotes values that it cannot accept (class 22), and so may raised
// errors (P0001) and pgx. The SQLSTATE stays.
func withoutValues(_ []string, attr slog.Attr) slog.Attr {
	err, ok := attr.Value.Any().(error)
	if !ok {
		return attr
	}
	text := encodeError.ReplaceAllString(err.Error(), "$1")
	var refused *pgconn.PgError
	if errors.As(err, &refused) && refused.Message != "" &&
		(strings.HasPrefix(refused.Code, "22") || refused.Code == "P0001") {
		text = strings.ReplaceAll(text, refused.Message, "(values not shown)")
	}
	return slog.String(attr.Key, text)
}

// traced adds the trace of the context to the record. If the logger had a group, the trace would be within it. Our
// loggers have none.
type traced struct{ slog.Handler }

func (h traced) Handle(ctx context.Context, record slog.Record) error {
	if span := trace.SpanContextFromContext(ctx); span.IsValid() {
		record.AddAttrs(slog.String("trace_id", span.TraceID().String()), slog.String("span_id", span.SpanID().String()))
	}
	return h.Handler.Handle(ctx, record)
}

func (h traced) WithAttrs(attrs []slog.Attr) slog.Handler { return traced{h.Handler.WithAttrs(attrs)} }
func (h traced) WithGroup(name string) slog.Handler       { return traced{h.Handler.WithGroup(name)} }

// bare drops the attributes of a record. OpenTelemetry logs the values of variables that it cannot use, and the
// values may be secrets.
type bare struct{ slog.Handler }

func (h bare) Handle(ctx context.Context, record slog.Record) error {
	return h.Handler.Handle(ctx, slog.NewRecord(record.Time, record.Level, record.Message, record.PC))
}

func (h bare) WithAttrs([]slog.Attr) slog.Handler { return h }
func (h bare) WithGroup(string) slog.Handler      { return h }
