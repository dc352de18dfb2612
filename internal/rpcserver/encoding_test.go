package rpcserver_test

import (
	"context"
	"io"
	"net/http"
	"strings"
	"testing"

	"example.com/shop/internal/rpcserver"
)

// A stream whose compression is not known is told so, in a form that clients read: Connect's own answer names an empty compression.
func TestUnknownCompressionOfAStream(t *testing.T) {
	t.Parallel()
	server := serve(t, rpcserver.Config{}, stream(func(context.Context, string, func(string) error) error { return nil }))
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, server.url+streamSpec.Procedure, strings.NewReader("\x00\x00\x00\x00\x02\"\""))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/connect+json")
	req.Header.Set("Connect-Content-Encoding", "br")
	res, err := httpClient(t, false).Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if named, has := res.Header["Connect-Content-Encoding"]; has || err != nil || !strings.Contains(string(body), `"code":"unimplemented"`) {
		t.Errorf("compression %q: %s %q, %v", named, res.Status, body, err)
	}
}
