package bounds

import (
	"regexp"
	"strings"
)

// anyURL finds what may be a URL. It ends where error texts end their quotations.
var anyURL = regexp.MustCompile("[A-Za-z][A-Za-z0-9+.-]*://[^\\s\"'`<>]*")

// URLs returns text with its URLs cut down to scheme, host and path. User info, query and fragment may hold passwords and
// tokens; an ellipsis stands for them. If it is not certain where a secret ends, because the URL is malformed, only the
// scheme stays.
func URLs(text string) string {
	if !strings.Contains(text, "://") {
		return text
	}
	return anyURL.ReplaceAllStringFunc(text, bareURL)
}

func bareURL(whole string) string {
	const hidden = "…"
	scheme, rest, _ := strings.Cut(whole, "://")
	user, query := strings.LastIndex(rest, "@"), strings.IndexAny(rest, "?#")
	if query >= 0 && query < user {
		return scheme + "://" + hidden // a password with a question mark, or a query with an @
	}
	if query >= 0 {
		rest = rest[:query+1] + hidden
	}
	if user >= 0 {
		rest = hidden + rest[user:]
	}
	return scheme + "://" + rest
}
