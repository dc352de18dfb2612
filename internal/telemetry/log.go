// Package telemetry sets up what the processes tell about themselves.
package telemetry

import (
	"io"
	"log/slog"
)

// NewLogger makes a logger that writes lines to w, as "json" or, with any other format, as "text".
func NewLogger(w io.Writer, format string, level slog.Level) *slog.Logger {
	options := &slog.HandlerOptions{Level: level}
	if format == "json" {
		return slog.New(slog.NewJSONHandler(w, options))
	}
	return slog.New(slog.NewTextHandler(w, options))
}
