package bounds

import (
	"regexp"
	"strings"
)

// anyURL matches possible URLs. A match ends at the quotation marks that error texts use.
var anyURL = regexp.MustCompile("[A-Za-z][A-Za-z0-9+.-]*://[^\\s\"'`<>]*")

// URLs returns text with its URLs reduced to scheme, host and path. User info, query and fragment may contain passwords
// and tokens, so an ellipsis replaces them. If a URL is malformed and the end of a secret is uncertain, only its scheme
// stays.
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
