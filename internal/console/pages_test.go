package console

import (
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
)

// The console is small, has a strict content security policy, and is sent compressed to clients that accept gzip.
func TestPages(t *testing.T) {
	t.Parallel()
	server := httptest.NewServer(Pages())
	defer server.Close()
	packed := 0
	for _, name := range []string{"", "console.js", "console.css", "icon.svg"} {
		request, err := http.NewRequestWithContext(t.Context(), http.MethodGet, server.URL+Prefix+name, nil)
		if err != nil {
			t.Fatal(err)
		}
		request.Header.Set("Accept-Encoding", "gzip")
		response, err := server.Client().Do(request)
		if err != nil {
			t.Fatal(err)
		}
		response.Body.Close()
		header := response.Header
		if response.StatusCode != http.StatusOK || header.Get("Content-Encoding") != "gzip" ||
			header.Get("Content-Security-Policy") != policy {
			t.Errorf("%q: %s, %v", name, response.Status, header)
		}
		packed += int(response.ContentLength)
		request.Header.Set("If-None-Match", header.Get("ETag"))
		if response, err = server.Client().Do(request); err != nil || response.StatusCode != http.StatusNotModified {
			t.Errorf("%q again: %v, %v", name, response, err)
		}
	}
	t.Logf("%d bytes in all, gzipped", packed)
	if packed > 100_000 {
		t.Errorf("the console has %d bytes gzipped, more than 100 kB", packed)
	}
	for _, unsafe := range []string{"unsafe-inline", "unsafe-eval", "http:", "https:", "*"} {
		if strings.Contains(policy, unsafe) {
			t.Errorf("the policy contains %s", unsafe)
		}
	}
}
