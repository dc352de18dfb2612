//go:build unix

package testenv

import (
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"testing"
)

// With its vhost gone beneath it, what dead-letters for a quorum queue crashes, and takes the queues of other tests
// with it. So queues go first, each before the one that it dead-letters to.
func TestQueuesGoBeforeTheirVhost(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		status int
		fails  bool
	}{
		"deleted": {http.StatusNoContent, false}, "gone already": {http.StatusNotFound, false}, "exclusive": {http.StatusBadRequest, false},
		"refused": {http.StatusInternalServerError, true},
	} {
		var asked []string
		server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			asked = append(asked, r.Method+" "+r.URL.EscapedPath())
			switch {
			case r.Method == http.MethodGet:
				_, _ = w.Write([]byte(`[{"name": "b.dead"}, {"name": "a"}, {"name": "b"}, {"name": "a.dead"}]`))
			case r.URL.Path == "/api/vhosts/v/1":
				w.WriteHeader(http.StatusNoContent)
			default:
				w.WriteHeader(test.status)
			}
		}))
		base, err := url.Parse(server.URL)
		if err != nil {
			t.Fatal(err)
		}
		client := &management{base: base, http: server.Client()}
		err = client.deleteVhost(t.Context(), "v/1")
		server.Close()
		want := []string{
			"GET /api/queues/v%2F1", "DELETE /api/queues/v%2F1/a", "DELETE /api/queues/v%2F1/a.dead", "DELETE /api/queues/v%2F1/b",
			"DELETE /api/queues/v%2F1/b.dead", "DELETE /api/vhosts/v%2F1",
		}
		if test.fails {
			want = want[:2]
		}
		if (err != nil) != test.fails || !slices.Equal(asked, want) {
			t.Errorf("%s: %v, asked %q", name, err, asked)
		}
	}
}
