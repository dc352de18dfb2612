package session

import (
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"
)

func TestPin(t *testing.T) {
	t.Parallel()
	const sets, utf8 = "the connection URL sets ", `client_encoding to "LATIN1", but only "UTF8" works`
	for url, want := range map[string]string{
		"postgres://u@h/d": "",
		"postgres://u@h/d?search_path=public&client_encoding=utf8": "",
		"postgres://u@h/d?lock_timeout=1000":                       "",
		"postgres://u@h/d?search_path=app": sets +
			`search_path to "app", but only "public" works`,
		"postgres://u@h/d?client_encoding=LATIN1": sets + utf8,
	} {
		for _, pooled := range []bool{false, true} {
			config, err := pgx.ParseConfig(url)
			if err != nil {
				t.Fatal(err)
			}
			local, err := Pin(config, Options{Pooled: pooled})
			if got := errorText(err); got != want {
				t.Errorf("%s: got error %q, want %q", url, got, want)
			}
			if err != nil {
				continue
			}
			if pooled == (local == "") || pooled && config.RuntimeParams["statement_timeout"] != "" {
				t.Errorf("%s, pooled %t: got %v and %q", url, pooled, config.RuntimeParams, local)
			}
			if !pooled && len(config.RuntimeParams) != len(Pinned) {
				t.Errorf("%s: got %v", url, config.RuntimeParams)
			}
			given := strings.Contains(url, "lock_timeout=1000")
			if given && config.RuntimeParams["lock_timeout"] != "1000" || given &&
				strings.Contains(local, "lock_timeout") {
				t.Errorf("%s: the URL's value was overwritten: %v, %q", url, config.RuntimeParams, local)
			}
		}
	}
}

func errorText(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}
