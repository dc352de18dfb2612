package bounds

import (
	"strings"
	"unicode/utf8"

	"connectrpc.com/connect/v2"
)

// These limits of an error keep gRPC's trailers below the 8 KiB that common clients accept. The trailers contain the
// text twice: percent-encoded, and in base64 together with the details.
const (
	// MaxErrorText is the longest text of an error, in bytes.
	MaxErrorText = 1 << 10
	// MaxErrorDetails is the largest total size of an error's details, in bytes.
	MaxErrorDetails = 2 << 10
)

// Error returns err within the limits. It cuts the text and drops details that do not fit.
func Error(err *connect.Error) *connect.Error {
	details, size := err.Details(), 0
	fits := details[:0]
	for _, detail := range details {
		if cost := len(detail.Type) + len(detail.Value); size+cost <= MaxErrorDetails {
			size += cost
			fits = append(fits, detail)
		}
	}
	if len(err.Message()) <= MaxErrorText && len(fits) == len(details) {
		return err
	}
	short := connect.NewError(err.Code(), Text(err.Message(), MaxErrorText)).WithCause(err)
	for _, detail := range fits {
		short = short.WithDetail(detail)
	}
	return short
}

// Text returns text as valid UTF-8 of at most that many bytes. If it cuts the text, it appends an ellipsis.
func Text(text string, most int) string {
	const more = "…"
	short := strings.ToValidUTF8(text[:min(len(text), most)], "\ufffd")
	if len(text) <= most && len(short) <= most {
		return short
	}
	cut := min(len(short), most-len(more))
	for cut > 0 && cut < len(short) && !utf8.RuneStart(short[cut]) {
		cut--
	}
	return short[:cut] + more
}
