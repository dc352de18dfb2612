package messaging

import (
	"strings"
	"unicode/utf8"
)

// ValidText tells whether Postgres can store s as text: it refuses NUL and broken UTF-8.
func ValidText(s string) bool {
	return utf8.ValidString(s) && strings.IndexByte(s, 0) < 0
}

// CleanText returns s as Postgres can store it, with a replacement character for what it cannot, and cut at 4 KiB: it is for error
// texts and for what broken messages carry.
func CleanText(s string) string {
	const limit = 4 << 10
	s = s[:min(len(s), limit)] // at first, so that cleaning is cheap, and again since replacements are longer
	s = strings.ReplaceAll(strings.ToValidUTF8(s, "\uFFFD"), "\x00", "\uFFFD")
	return strings.ToValidUTF8(s[:min(len(s), limit)], "")
}
