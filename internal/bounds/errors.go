package bounds

import (
	"strings"
	"unicode/utf8"

	"connectrpc.com/connect/v2"
)

// Limits of what an error tells, chosen so that gRPC's trailers stay below the 8 KiB that common clients take: the text
// stands there twice, once percent-encoded and once in base64 beside the details.
const (
	// MaxErrorText is the longest text of an error in bytes.
	MaxErrorText = 1 << 10
	// MaxErrorDetails is the most bytes of all details of an error.
	MaxErrorDetails = 2 << 10
)

// Error returns err within the limits: its text cut, and without the details that do not fit.
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

// Text returns text as valid UTF-8 of at most that many bytes, with an ellipsis where something is missing.
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
