package bounds_test

import (
	"testing"

	"example.com/shop/internal/bounds"
)

func TestURLsLoseTheirSecrets(t *testing.T) {
	for text, want := range map[string]string{
		"":                                   "",
		"no URL: a@b?c":                      "no URL: a@b?c",
		"http://h:1/path":                    "http://h:1/path",
		"spiffe://example.org/billing":       "spiffe://example.org/billing",
		"https://u:p@h/path":                 "https://…@h/path",
		"https://token@h":                    "https://…@h",
		"https://h/path?token=s#f":           "https://h/path?…",
		"https://h/path#s":                   "https://h/path#…",
		"amqps://u:p@h:5671/v?certfile=c":    "amqps://…@h:5671/v?…",
		"postgres://u:p@h1:1,h2:2/d?x=s":     "postgres://…@h1:1,h2:2/d?…",
		`Get "https://u:p@h/?s": EOF`:        `Get "https://…@h/?…": EOF`,
		"cannot parse `postgres://u:p@h`: x": "cannot parse `postgres://…@h`: x",
		"https://u:p@p@h/":                   "https://…@h/",
		"https://u:a/b@h/":                   "https://…@h/",
		"https://u:a?b@h/":                   "https://…",
		"https://h/?a=b@c&s":                 "https://…",
		"http://a?s and http://b@c":          "http://a?… and http://…@c",
	} {
		if got := bounds.URLs(text); got != want {
			t.Errorf("%q became %q, want %q", text, got, want)
		}
	}
}
