package messaging

import (
	"strings"
	"unicode/utf8"
)

// ValidText reports whether Postgres can store s as text: it refuses NUL and invalid UTF-8.
func ValidText(s string) bool {
	return utf8.ValidString(s) && strings.IndexByte(s, 0) < 0
}

// CleanText makes s storable in Postgres: it substitutes a replacement character for each invalid part, and truncates
// the result at 4 KiB. It is for error texts and for the contents of broken messages.
func CleanText(s string) string {
	const limit = 4 << 10
	s = s[:min(len(s), limit)] // cut first to keep cleaning cheap, and again below because replacements are longer
	s = strings.ReplaceAll(strings.ToValidUTF8(s, "\uFFFD"), "\x00", "\uFFFD")
	return strings.ToValidUTF8(s[:min(len(s), limit)], "")
}
