//go:build unix

package testenv

import (
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"testing"
)

// The dead-lettering process of a quorum queue crashes when its vhost disappears, which breaks the queues of other
// tests. So delete the queues first, each before the queue that it dead-letters to.
func TestQueuesGoBeforeTheirVhost(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		status int
		fails  bool
	}{
		"deleted": {http.StatusNoContent, false}, "already gone": {http.StatusNotFound, false},
		"exclusive": {http.StatusBadRequest, false}, "refused": {http.StatusInternalServerError, true},
	} {
		var requests []string
		server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			requests = append(requests, r.Method+" "+r.URL.EscapedPath())
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
			"GET /api/queues/v%2F1", "DELETE /api/queues/v%2F1/a", "DELETE /api/queues/v%2F1/a.dead",
			"DELETE /api/queues/v%2F1/b", "DELETE /api/queues/v%2F1/b.dead", "DELETE /api/vhosts/v%2F1",
		}
		if test.fails {
			want = want[:2]
		}
		if (err != nil) != test.fails || !slices.Equal(requests, want) {
			t.Errorf("%s: %v, requests %q", name, err, requests)
		}
	}
}
